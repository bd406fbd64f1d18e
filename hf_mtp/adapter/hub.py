"""Saving and pushing an upgraded model: adapters that load again, with a card that says how."""

from pathlib import Path
from tempfile import TemporaryDirectory

import peft
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from .base_identity import record_base
from .card import README, is_replaceable, write_model_card


class PeftModelForCausalLM(peft.PeftModelForCausalLM):
    """PEFT's model, which writes adapters that load again, each with a card of its own.

    transformers' `push_to_hub` would end by writing a card of its own over the adapter's. PEFT chooses the class of a
    model by the task type of its config, and [`~peft.AutoPeftModelForCausalLM`] goes by the name of the class, so this
    one has the name of the class it extends.
    """

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        **kwargs,
    ) -> None:
        """Saves adapters with their cards, and nothing of the base, also where its vocabulary has grown.

        Args are those of [`~peft.PeftModel.save_pretrained`].

        Raises:
            ValueError: The file would be refused when it is loaded: pickled weights or the base's embeddings are asked
                for, a field of a config does not fit a gated adapter, or weights are not finite.
        """
        if not safe_serialization or save_embedding_layers is True:
            asked = "safe_serialization=False" if not safe_serialization else "save_embedding_layers=True"
            raise ValueError(
                f"`{asked}` writes a file that would be refused when it is loaded: adapters are safetensors, and hold "
                "nothing of the base. Leave it out."
            )
        configs = self.peft_config
        names = [name for name in configs if selected_adapters is None or name in selected_adapters]
        for name in names:
            configs[name].check()
            # The base may have been resized since the upgrade.
            record_base(configs[name], self.get_base_model(), configs[name].base_hidden_size)
        super().save_pretrained(
            save_directory,
            selected_adapters=selected_adapters,
            save_embedding_layers=False,
            is_main_process=is_main_process,
            **kwargs,
        )
        if is_main_process:
            for name in names:
                write_model_card(configs[name], Path(save_directory, _subfolder(name) or ""))

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

        The active adapter is at the root of the repository, whatever its name, unless another one is named `default`,
        which is PEFT's name for that place. A card that somebody wrote by hand, in the repository, is kept.

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
            self._save_for_hub(Path(folder), repo_id, tags)
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

    def _save_for_hub(self, folder: Path, repo_id: str, tags: list[str] | None) -> None:
        """Writes what a repository holds into a folder, each adapter with a card that loads it from there."""
        self.save_pretrained(folder)
        main = "default" if "default" in self.peft_config else self.active_adapters[0]
        if main != "default":
            for file in (folder / main).iterdir():
                file.replace(folder / file.name)
            (folder / main).rmdir()
        for name, config in self.peft_config.items():
            subfolder = None if name == main else name
            write_model_card(config, folder / (subfolder or ""), repo_id, tags, subfolder)


def _subfolder(adapter_name: str) -> str | None:
    """Where PEFT saves an adapter."""
    return None if adapter_name == "default" else adapter_name


def _has_card_by_hand(api: HfApi, repo_id: str, revision: str | None) -> bool:
    if not api.file_exists(repo_id, README, revision=revision):
        return False
    return not is_replaceable(Path(api.hf_hub_download(repo_id, README, revision=revision)))
