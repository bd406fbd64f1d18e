"""Saving and pushing an upgraded model: adapters that load again, with a card that says how."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.utils import CONFIG_NAME, logging

from ..base.inspection import auto_class
from ..base.lora_layers import lora_weights
from .base_identity import record_base
from .card import README, is_on_hub, is_replaceable, license_of, write_model_card
from .config import GatedLoraConfig
from .custom_generate import CUSTOM_GENERATE, custom_generate_files, write_custom_generate
from .gate import ungated_layers
from .loading import refuse_beside_a_model, refuse_model_folder, refuse_without_weights
from .ngram_table import save_ngrams

logger = logging.get_logger(__name__)


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
        custom_generate: bool = False,
        **kwargs,
    ) -> None:
        """Saves adapters with their model cards. Never saves weights of the base, even if its vocabulary has grown.

        If the folder already has the same weights, the new card keeps the results of `evaluate` from the old one.

        Args:
            custom_generate (`bool`, *optional*, defaults to `False`): Whether to add `custom_generate/generate.py`, so
                that `base.generate(..., custom_generate=save_directory, trust_remote_code=True)` uses the adapter in a
                script that does not import hf_mtp. The folder may be moved, or uploaded by other tools.
            save_directory, safe_serialization, selected_adapters, save_embedding_layers, is_main_process, kwargs:
                Those of [`~peft.PeftModel.save_pretrained`].

        Raises:
            ValueError: The file would be refused when it is loaded: pickled weights, the base's embeddings or another
                LoRA's weights are asked for, a field of a config does not fit a gated adapter, or weights are not
                finite. Or the folder holds a model.
        """
        asked = {
            "safe_serialization=False": not safe_serialization,
            "save_embedding_layers=True": save_embedding_layers is True,
            # PEFT would write the LoRA alone, with the rank of both. It undoes what our adapters never do to a base.
            "path_initial_model_for_weight_conversion": kwargs.get("path_initial_model_for_weight_conversion"),
        }
        for argument in (argument for argument, is_asked in asked.items() if is_asked):
            raise ValueError(
                f"`{argument}` would write a file that cannot be loaded: adapters must be safetensors with all of "
                "their own weights and none of the base. Leave it out."
            )
        self._warn_of_what_is_not_saved()
        configs = self.peft_config
        names = [name for name in configs if selected_adapters is None or name in selected_adapters]
        folders = {name: Path(save_directory, _subfolder(name) or "") for name in names}
        for folder in folders.values():
            refuse_model_folder(folder)
        before = {name: _weights_in(folder) for name, folder in folders.items() if is_main_process}
        for name in names:
            configs[name].check()
            self._refuse_changed_k(name)
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
            for name, folder in folders.items():
                # Otherwise the figures in the card are those of another adapter.
                same = before[name] is not None and before[name] == _weights_in(folder)
                save_ngrams(configs[name].ngrams, folder, keep=same)
                if custom_generate:
                    write_custom_generate(folder)
                write_model_card(
                    configs[name], folder, keep_evaluation=same, auto_class=auto_class(self.get_base_model())
                )

    def load_adapter(self, model_id: str | Path, adapter_name: str, *args, **kwargs):
        """As [`~peft.PeftModel.load_adapter`], but an adapter whose weights are refused is not left in the model."""
        is_new = adapter_name not in self.peft_config
        refuse_without_weights(model_id, kwargs.get("subfolder"))
        try:
            result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        except Exception:
            if is_new and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise
        # An adapter that lacks weights was refused. These belong to adapters of the base with the same name.
        result.missing_keys.clear()
        return result

    def _refuse_changed_k(self, adapter_name: str) -> None:
        tables, k = getattr(self.base_model, "lora_mask_embeddings", {}), self.peft_config[adapter_name].k
        masks = tables[adapter_name].num_embeddings if adapter_name in tables else k
        if masks != k:
            raise ValueError(
                f"`k` was changed to {k}, but the adapter has {masks} masks, so that its file could not be loaded. "
                "Set it back. To draft fewer tokens, pass `mtp_k` to `generate`."
            )

    def _warn_of_what_is_not_saved(self) -> None:
        """Warns if the base, or an adapter of its own, is being trained: a trainer that saves this model loses it."""
        if not hasattr(self.base_model, "gated_layers"):  # a tuner that its user registered for this config
            return
        if self.base_model.is_stacked and ungated_layers(self.get_base_model()):
            logger.warning_once(
                "The base has an adapter of its own, which is not saved: this model saves only its multi-token "
                "prediction adapter. Save yours through its own PeftModel, and load both: "
                "`PeftModel.from_pretrained(PeftModel.from_pretrained(base, yours), this)`. Otherwise the text is "
                "that of the base without it."
            )
        gated = {id(p) for p in lora_weights(self.base_model.gated_layers().values())}
        lost = sum(p.requires_grad and id(p) not in gated for p in self.get_base_model().parameters())
        if lost:
            logger.warning(
                "%d trainable weights of the base, or of its own adapters, are not saved: this model saves only "
                "its multi-token prediction adapter. Save the base yourself. If a trainer does the saving, call "
                "`hf_mtp.attached.attach(base, adapter)` and pass it the base.",
                lost,
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
        custom_generate: bool = False,
        card_from: str | Path | None = None,
    ) -> CommitInfo:
        """Uploads the adapter in one commit, so that readers never see half of it.

        The active adapter is at the root of the repository, whatever its name, unless another one is named `default`,
        which PEFT saves at the root. A hand-written card in the repository is kept.

        Args:
            repo_id (`str`): Name of the repository, which is made if it is missing.
            custom_generate (`bool`, *optional*, defaults to `False`): Whether to add `custom_generate/generate.py`, so
                that `base.generate(..., custom_generate=repo_id, trust_remote_code=True)` uses the adapter in a script
                that does not import hf_mtp. It is a second commit, because the file names the first one, from which
                the adapter is loaded.
            card_from (`str` or `Path`, *optional*): Folder that the adapter was loaded from. Its card is uploaded if
                it was written by hand. Otherwise the new card keeps the results of `evaluate` in it, unless the
                weights have changed.
            max_shard_size: Accepted for compatibility; adapters are never split.
            commit_message, commit_description, private, token, revision, create_pr, tags:
                Those of [`~transformers.utils.PushToHubMixin.push_to_hub`].

        Returns:
            [`~huggingface_hub.CommitInfo`]: The last commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if api.file_exists(repo_id, CONFIG_NAME, revision=revision):
            refuse_beside_a_model(f"The repository {repo_id}")
        with TemporaryDirectory() as folder:
            if card_from is not None:
                _copy_card(Path(card_from), Path(folder, _subfolder(self._main_adapter) or ""))
            tags = [*(tags or ()), *([CUSTOM_GENERATE] if custom_generate else ())]
            self._save_for_hub(Path(folder), repo_id, tags, api)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            if _card_by_hand(api, repo_id, revision) is not None:
                files.remove(Path(folder, README))
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
                commit_message=commit_message or "Upload multi-token prediction adapter",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        return _add_custom_generate(api, repo_id, commit, revision) if custom_generate else commit

    @property
    def _main_adapter(self) -> str:
        """The adapter at the root of a repository."""
        return "default" if "default" in self.peft_config else self.active_adapters[0]

    def _save_for_hub(self, folder: Path, repo_id: str, tags: list[str], api: HfApi) -> None:
        """Writes what a repository holds into a folder, each adapter with a card that loads it from there."""
        self.save_pretrained(folder)
        main = self._main_adapter
        if main != "default":
            for file in (folder / main).iterdir():
                file.replace(folder / file.name)
            (folder / main).rmdir()
        for name, config in self.peft_config.items():
            subfolder = None if name == main else name
            about = repo_id, tags, subfolder, _license_of_base(config, api)
            kind = auto_class(self.get_base_model())
            write_model_card(config, folder / (subfolder or ""), *about, keep_evaluation=True, auto_class=kind)


def _subfolder(adapter_name: str) -> str | None:
    """Where PEFT saves an adapter."""
    return None if adapter_name == "default" else adapter_name


def _weights_in(folder: Path) -> bytes | None:
    """A digest of an adapter's file, if there is one."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    return hashlib.sha256(file.read_bytes()).digest() if file.is_file() else None


def _copy_card(source: Path, folder: Path) -> None:
    """Puts a card, and the weights that it is about, where an adapter is about to be saved."""
    folder.mkdir(exist_ok=True)
    for name in (README, SAFETENSORS_WEIGHTS_NAME):
        if (source / name).is_file():
            shutil.copy(source / name, folder)


def _license_of_base(config: GatedLoraConfig, api: HfApi) -> dict[str, str]:
    """The license of the base by its card on the Hub: the adapter comes from the base, and works with it alone."""
    base = config.base_model_name_or_path
    if not base or not is_on_hub(base):
        return {}
    try:
        return license_of(api.model_info(base).card_data)
    except (HfHubHTTPError, HFValidationError):  # no name of a repository, or of none that we may read
        return {}


def _add_custom_generate(api: HfApi, repo_id: str, adapter: CommitInfo, revision: str | None) -> CommitInfo:
    """Adds what generates with the adapter of a commit, where that commit went."""
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(path, content) for path, content in custom_generate_files(repo_id, adapter.oid).items()],
        commit_message="Add custom_generate",
        revision=adapter.pr_revision or revision,
    )
    return replace(commit, pr_url=adapter.pr_url)


def _card_by_hand(api: HfApi, repo_id: str, revision: str | None) -> Path | None:
    """The card of a repository, if somebody wrote it by hand."""
    if not api.file_exists(repo_id, README, revision=revision):
        return None
    card = Path(api.hf_hub_download(repo_id, README, revision=revision))
    return None if is_replaceable(card) else card


def fetch_card_by_hand(
    repo_id: str, folder: str | Path, token: str | None = None, revision: str | None = None
) -> None:
    """Copies a card that somebody wrote by hand on the Hub into the folder that is to be uploaded there.

    Args:
        repo_id (`str`): The repository.
        folder (`str` or `Path`): The folder. A card that was written by hand there stays.
        token (`str`, *optional*): A token of the Hub.
        revision (`str`, *optional*): The branch.
    """
    if not is_replaceable(Path(folder, README)):
        return
    try:
        card = _card_by_hand(HfApi(token=token), repo_id, revision)
    except Exception as error:  # a training does not end because of it
        logger.warning("The card of %s could not be read: %s: %s", repo_id, type(error).__name__, error)
        return
    if card is not None:
        shutil.copy(card, Path(folder, README))
