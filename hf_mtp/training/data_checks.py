"""What cannot be trained, on or with: models, settings, and datasets, told by their columns before all else."""

import torch
from datasets import Dataset
from peft import PeftModel

from ..adapter.config import GatedLoraConfig
from ..base.inspection import refuse_attention_without_masks
from ..layout.blocks import useful_anchors
from ..model import GatedLoraModel
from ..passes.speculation_mode import SpeculationMode, speculation_mode
from .config import MTPConfig

CHATS = ("messages", "conversations")


def refuse_rows_of_no_format(dataset, name: str, text_field: str) -> None:
    """Raises unless every row has a value in the column that the dataset is read by.

    Args:
        dataset: What is looked at if it is a [`~datasets.Dataset`]; a stream shows its rows while training.
        name (`str`): What the user calls it.
        text_field (`str`): Column of plain texts.

    Raises:
        ValueError: There is no column to learn from, or it has rows without a value, as where formats are mixed.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom" or not len(dataset):
        return  # read through a function of the user's, or refused elsewhere
    formats = [column for column in ("input_ids", "prompt", *CHATS, text_field) if column in dataset.column_names]
    if not formats:
        raise ValueError(
            f"`{name}` has the columns {', '.join(map(repr, dataset.column_names))}, and none to learn from: it needs "
            f"{text_field!r} (or set `dataset_text_field`), 'messages', 'prompt' with 'completion', or 'input_ids'. "
            "Rename one with `dataset.rename_column`, or pass `formatting_func`."
        )
    # As TRL chooses: tokens and prompts by their column, a chat by whether the first row has one.
    read = next((column for column in formats if column not in CHATS or dataset[0][column] is not None), formats[0])
    gap = first_gap(dataset, read)
    if gap is None:
        return
    others = [column for column in formats if column != read and dataset[gap][column] is not None]
    advice = (
        f"It has {others[0]!r}, but rows of one dataset are read in one format: bring them to one by `dataset.map`."
        if others
        else f"Drop such rows: `dataset.filter(lambda row: row[{read!r}] is not None)`."
    )
    raise ValueError(f"`{name}` is read by its column {read!r}, but row {gap} has none. {advice}")


def first_gap(dataset: Dataset, column: str) -> int | None:
    """The first row whose value is missing; `None` if there is none."""
    if not dataset.data.column(column).null_count:  # counted with the data, so that most need not be read
        return None
    rows = dataset.select_columns(column)
    return next((number for number, row in enumerate(rows) if row[column] is None), None)


def refuse_datasets(
    args: MTPConfig, train_dataset, eval_dataset=None, processing_class=None, formatting_func=None, **kwargs
) -> None:
    """Raises for what TRL would stumble over, in words that say what is missing."""
    if formatting_func is None and not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        several = isinstance(eval_dataset, dict)
        evaluated = {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()} if several else {}
        evaluated = evaluated or {"eval_dataset": eval_dataset}
        for name, dataset in {"train_dataset": train_dataset, **evaluated}.items():
            refuse_rows_of_no_format(dataset, name, args.dataset_text_field)
    if args.assistant_only_loss and getattr(processing_class, "chat_template", "not known yet") is None:
        raise ValueError(
            "`assistant_only_loss=True` learns what the chat template marks by `{% generation %}`, but the "
            f"{type(processing_class).__name__} has no chat template: set `processing_class.chat_template`, or set "
            "`chat_template_path`."
        )


def refuse_settings(args: MTPConfig, tuner: GatedLoraModel) -> None:
    """Raises if a base or an adapter cannot be trained so.

    Args:
        args ([`MTPConfig`]): The settings.
        tuner ([`GatedLoraModel`]): The upgraded model.

    Raises:
        ValueError: Rows are too short for a block, or are packed though the base cannot compute their documents apart,
            or its attention takes no masks at all.
    """
    k = tuner.active_mtp_config.k
    if args.max_length is not None and args.max_length < k + 2:
        raise ValueError(
            f"`max_length={args.max_length}` leaves no room for a token, the one after it and the {k} that its masks "
            f"predict: set it to at least k + 2 = {k + 2}."
        )
    refuse_attention_without_masks(tuner.model)
    packed = next((name for name in ("packing", "eval_packing", "padding_free") if getattr(args, name)), None)
    if packed is not None and speculation_mode(tuner.model) is not SpeculationMode.TREE:
        raise ValueError(
            f"`{packed}=True` puts several texts in a row, but {type(tuner.model).__name__} reads one sequence per "
            f"row and would mix them. Set `{packed}=False`."
        )


def refuse_nothing_to_learn(dataset, max_length: int | None) -> None:
    """Raises unless some sequence has two tokens in a row inside the loss, the second of which a mask predicts.

    Args:
        dataset: Tokenized rows. What a stream or the user's own function makes shows only while training.
        max_length (`int`, *optional*): What rows were truncated to, for the message.

    Raises:
        ValueError: None has.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    if "input_ids" not in dataset.column_names:
        return
    for row in dataset:
        labels_1T = torch.as_tensor(row.get("labels", row["input_ids"]))[None]
        if useful_anchors(labels_1T, torch.zeros_like(labels_1T)).any():
            return
    raise ValueError(
        "No sequence of `train_dataset` has two tokens in a row inside the loss, so there is nothing for a mask to "
        f"predict. Are they all prompt, or truncated to their prompt by `max_length={max_length}`?"
    )


def gated(model) -> GatedLoraModel:
    """The tuner inside an upgraded model.

    Raises:
        ValueError: The model was not upgraded.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, GatedLoraModel):
        raise ValueError(
            f"MTPTrainer trains upgraded models, but got {type(model).__name__}. Upgrade it first, "
            "`model = get_peft_model(model, GatedLoraConfig(k=8))`, or pass `peft_config=GatedLoraConfig(k=8)`."
        )
    return tuner


def refuse_model(args: MTPConfig, model, peft_config=None) -> None:
    """Raises for a model, as it was passed to the trainer, that cannot be trained.

    Raises:
        ValueError: It was not upgraded and will not be, is not trainable, or would be upgraded after its vocabulary
            grew.
    """
    if peft_config is None:
        return refuse_parameters(gated(model))
    if not isinstance(peft_config, GatedLoraConfig):
        raise ValueError(
            f"MTPTrainer upgrades a model by `peft_config=GatedLoraConfig(...)`, but got {type(peft_config).__name__}."
        )
    if args.chat_template_path and not args.chat_template_path.endswith((".jinja", ".j2")):
        raise ValueError(
            f"`chat_template_path={args.chat_template_path!r}` is a tokenizer: TRL adds its tokens to the base and "
            "would train their embeddings and `lm_head` beside the adapter, but the base stays as it is. Pass a "
            "template alone (a .jinja file), or give the base these tokens before the upgrade, by "
            "`trl.clone_chat_template`."
        )


def refuse_parameters(tuner: GatedLoraModel) -> None:
    """Raises unless the active adapter is trainable, and nothing else.

    Raises:
        ValueError: It is not.
    """
    adapter = f".{tuner.active_adapters[0]}."
    trainable = [name for name, parameter in tuner.named_parameters() if parameter.requires_grad]
    others = [name for name in trainable if "lora_" not in name or adapter not in f"{name}."]
    if not trainable:
        raise ValueError(
            "The adapter is not trainable: it was loaded for inference, or frozen. Load it with "
            "`PeftModel.from_pretrained(base, folder, is_trainable=True)`, or call "
            f"`model.set_adapter({tuner.active_adapters[0]!r})`."
        )
    if others:
        raise ValueError(
            f"MTPTrainer trains the adapter alone, but {len(others)} parameters beside it are trainable, such as "
            f"{others[0]!r}, and would change the base's output. Freeze them by `requires_grad_(False)`."
        )
