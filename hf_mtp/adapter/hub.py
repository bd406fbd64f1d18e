"""`push_to_hub` of an upgraded model: all of an adapter in one commit, with its own card."""

from pathlib import Path
from tempfile import TemporaryDirectory

import peft
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from .card import README, is_replaceable


class PeftModelForCausalLM(peft.PeftModelForCausalLM):
    """PEFT's model, whose uploads carry the adapter's own card.

    transformers' `push_to_hub` ends by writing a card of its own over the one that `save_pretrained` wrote. PEFT
    chooses the class of a model by the task type of its config, and [`~peft.AutoPeftModelForCausalLM`] goes by the
    name of the class, so this one has the name of the class it extends.
    """

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        **kwargs,
    ) -> None:
        """Saves the adapters, and nothing of the base, also where its vocabulary has grown.

        Args are those of [`~peft.PeftModel.save_pretrained`].

        Raises:
            ValueError: Pickled weights or the base's embeddings are asked for, which no adapter is loaded from.
        """
        if not safe_serialization or save_embedding_layers is True:
            asked = "safe_serialization=False" if not safe_serialization else "save_embedding_layers=True"
            raise ValueError(
                f"`{asked}` writes a file that would be refused when it is loaded: adapters are safetensors, and hold "
                "nothing of the base. Leave it out."
            )
        super().save_pretrained(
            save_directory, selected_adapters=selected_adapters, save_embedding_layers=False, **kwargs
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Uploads the adapter in one commit, so that no reader meets half of it.

        A card that somebody wrote by hand, in the repository, is kept.

        Args:
            repo_id (`str`): Name of the repository, which is made if it is missing.
            max_shard_size: Taken for the sake of the interface; adapters are never split.
            commit_message, commit_description, private, token, revision, create_pr, tags:
                Those of [`~transformers.utils.PushToHubMixin.push_to_hub`].

        Returns:
            [`~huggingface_hub.CommitInfo`]
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            self.active_peft_config.write_model_card(folder, repo_id, tags)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            if _has_card_by_hand(api, repo_id, revision):
                files.remove(Path(folder, README))
            return api.create_commit(
                repo_id,
                [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
                commit_message=commit_message or "Upload multi-token prediction adapter",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def _has_card_by_hand(api: HfApi, repo_id: str, revision: str | None) -> bool:
    if not api.file_exists(repo_id, README, revision=revision):
        return False
    return not is_replaceable(Path(api.hf_hub_download(repo_id, README, revision=revision)))
