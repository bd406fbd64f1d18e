"""`push_to_hub` of an upgraded model, with the adapter's own card."""

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from peft import PeftModel
from transformers.utils import PushToHubMixin

from .card import README, is_replaceable
from .config import GatedLoraConfig


def push_to_hub(model: PeftModel, repo_id: str, **kwargs) -> CommitInfo:
    """Uploads an adapter; [`register`] makes it the `push_to_hub` of [`~peft.PeftModel`].

    The one of transformers ends by writing its own card over the one that `save_pretrained` wrote, and leaves no seam to
    keep it. Adapters of other types still go through that one.

    Args:
        model ([`~peft.PeftModel`]): The model whose adapter to upload.
        repo_id (`str`): Name of the repository, which is made if it is missing.
        kwargs: Those of [`~transformers.utils.PushToHubMixin.push_to_hub`].

    Returns:
        [`~huggingface_hub.CommitInfo`]
    """
    if isinstance(model.active_peft_config, GatedLoraConfig):
        return _push_gated(model, repo_id, **kwargs)
    return PushToHubMixin.push_to_hub(model, repo_id, **kwargs)


def _push_gated(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,  # adapters are never split
    tags: list[str] | None = None,
) -> CommitInfo:
    """All files in one commit, so that no reader meets half an adapter."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.active_peft_config.write_model_card(folder, repo_id, tags)
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
