"""Checks models, settings and datasets before training. Knows nothing of the training loop."""

from operator import and_

import torch
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from peft import PeftModel

from ..adapter.config import GatedLoraConfig
from ..adapter.loading import refuse_beside_a_model, refuse_model_folder
from ..adapter.stacked import own_weights
from ..base.inspection import refuse_attention_without_masks
from ..layout.blocks import IGNORE, useful_anchors
from ..model import GatedLoraModel
from ..passes.speculation_mode import SpeculationMode, speculation_mode
from .config import MTPConfig

CHAT_COLUMNS = ("messages", "conversations")
IMAGES = {"image", "images"}  # TRL's collator for them goes by 'messages' first


def refuse_unreadable_rows(dataset, name: str, text_field: str) -> None:
    """Raises unless every row has a value in the column that TRL will use.

    Args:
        dataset: Checked if it is a [`~datasets.Dataset`]. The rows of a stream are known only during training.
        name (`str`): The user's name for it, for messages.
        text_field (`str`): Column of plain texts.

    Raises:
        ValueError: No column can be learned from, prompts have no completions, or some rows have no value, because
            formats are mixed.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom" or not len(dataset):
        return  # the user's own function makes the rows, or another check refuses it
    known = ("input_ids", "prompt", *CHAT_COLUMNS, text_field)
    formats = [column for column in known if column in dataset.column_names]
    if not formats:
        raise ValueError(
            f"`{name}` has the columns {', '.join(map(repr, dataset.column_names))}, and none to learn from. It needs "
            f"{text_field!r} (or set `dataset_text_field`), 'messages', 'prompt' with 'completion', or 'input_ids'. "
            "Rename one with `dataset.rename_column`, or pass `formatting_func`."
        )
    _refuse_prompts_alone(dataset.column_names, name, [column for column in formats if column != "prompt"])
    # As TRL does: it decides on tokens and prompts by the column, on chats by the first row.
    chosen = next((name for name in formats if name not in CHAT_COLUMNS or dataset[0][name] is not None), formats[0])
    empty = first_empty_row(dataset, chosen)
    if empty is None and chosen == "prompt" and "completion" in dataset.column_names:
        chosen, formats = "completion", [column for column in formats if column != "prompt"]
        empty = first_empty_row(dataset, chosen)
    if empty is None:
        return
    others = [column for column in formats if column != chosen and dataset[empty][column] is not None]
    advice = (
        f"It has {others[0]!r}, but all rows of a dataset must have one format: convert them with `dataset.map`."
        if others
        else f"Drop such rows: `dataset.filter(lambda row: row[{chosen!r}] is not None)`."
    )
    raise ValueError(f"`{name}` is read by its column {chosen!r}, but row {empty} has none. {advice}")


def _refuse_prompts_alone(columns: list[str], name: str, others: list[str]) -> None:
    """Raises for a column of prompts without one of completions, even if the dataset has other texts."""
    if "prompt" not in columns or {"input_ids", "completion"} & {*columns} or IMAGES & {*columns}:
        return
    advice = "Add responses, such as the model's own: `regenerate_responses(model, tokenizer, dataset, folder)`."
    if others:
        advice = f"To learn from {others[0]!r}, drop the prompts: `dataset.remove_columns('prompt')`."
    raise ValueError(
        f"`{name}` has the column 'prompt' and no 'completion'. TRL needs both, and reads no other texts if there are "
        f"prompts. {advice}"
    )


def first_empty_row(dataset: Dataset, column: str) -> int | None:
    """The number of the first row without a value; `None` if there is none."""
    if not dataset.data.column(column).null_count:  # stored with the data: no need to read most datasets
        return None
    rows = dataset.select_columns(column)
    return next((number for number, row in enumerate(rows) if row[column] is None), None)


def refuse_padding(dataset, name: str) -> None:
    """Raises if rows have padding that would be taken for text: TRL drops `attention_mask` and makes its own.

    Padding at the end of a row, with labels of -100, does no harm.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    if not {"input_ids", "attention_mask"} <= {*dataset.column_names}:
        return
    columns = [column for column in ("attention_mask", "labels") if column in dataset.column_names]
    for number, row in enumerate(dataset.select_columns(columns).with_format(None)):
        is_padding = [not attended for attended in row["attention_mask"]]
        in_loss = [label != IGNORE for label in row["labels"]] if "labels" in row else [True] * len(is_padding)
        is_before_text = True in is_padding and False in is_padding[is_padding.index(True) :]
        if is_before_text or any(map(and_, is_padding, in_loss)):
            raise ValueError(
                f"Row {number} of `{name}` has padding, which TRL reads as text: it drops 'attention_mask', so masks "
                "would learn to predict padding. Tokenize without `padding`: the trainer pads batches itself."
            )


def _by_name(train_dataset, eval_dataset) -> dict:
    """All datasets by the names that the user knows them by."""
    if not isinstance(eval_dataset, dict):
        return {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    of_eval = {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    return {"train_dataset": train_dataset, **of_eval}


def refuse_datasets(
    args: MTPConfig, train_dataset, eval_dataset=None, processing_class=None, formatting_func=None, **kwargs
) -> None:
    """Raises for datasets on which TRL would fail without naming the cause."""
    datasets = _by_name(train_dataset, eval_dataset)
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(
                f"`{name}` is empty. Pass at least one text{' to learn from' * (name == 'train_dataset')}."
            )
    if formatting_func is None and not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        for name, dataset in datasets.items():
            refuse_unreadable_rows(dataset, name, args.dataset_text_field)
            if kwargs.get("data_collator") is None:
                refuse_padding(dataset, name)
    if args.assistant_only_loss and getattr(processing_class, "chat_template", "not known yet") is None:
        raise ValueError(
            "`assistant_only_loss=True` needs a chat template that marks responses with `{% generation %}`, but the "
            f"{type(processing_class).__name__} has no chat template. Set `processing_class.chat_template` or "
            "`chat_template_path`."
        )


def refuse_settings(args: MTPConfig, tuner: GatedLoraModel, parallelism: ParallelismConfig | None = None) -> None:
    """Raises if the model cannot be trained with these settings.

    Raises:
        ValueError: The output would go to the place of a model; rows are too short for a block; or packed, though the
            base or TRL would mix their documents; or spread over processes; or the base's attention implementation
            takes no masks.
    """
    for kind in ("cp", "sp"):
        if getattr(parallelism, f"{kind}_enabled", False):
            raise ValueError(
                f"`{kind}_size={getattr(parallelism, f'{kind}_size')}` splits sequences over processes, but the masks "
                "of a sequence need all of it. Leave it at 1: a smaller `masks_per_part` saves memory, too."
            )
    if tuner.active_adapters[0] == "default":  # others are saved into a folder of their own
        refuse_model_folder(args.output_dir)
        if args.push_to_hub and args.hub_model_id == tuner.model.name_or_path:
            refuse_beside_a_model(f"The repository {args.hub_model_id}")
    k = tuner.active_mtp_config.k
    if args.max_length is not None and args.max_length < k + 2:
        raise ValueError(
            f"`max_length={args.max_length}` is too short for a token, its successor and the {k} tokens that its "
            f"masks predict. Set it to at least k + 2 = {k + 2}."
        )
    refuse_attention_without_masks(tuner.model)
    if args.eval_packing and not (args.packing or args.padding_free):
        raise ValueError(
            "`eval_packing=True` without `packing=True` mixes the texts of a row: TRL separates them only if it packs "
            "for training, too. Set `eval_packing=False`, or `packing=True`."
        )
    packed = next((name for name in ("packing", "eval_packing", "padding_free") if getattr(args, name)), None)
    if packed is not None and speculation_mode(tuner.model) is not SpeculationMode.TREE:
        raise ValueError(
            f"`{packed}=True` puts several texts in a row, but {type(tuner.model).__name__} reads one sequence per "
            f"row and would mix the texts. Set `{packed}=False`."
        )


def refuse_without_targets(train_dataset, eval_dataset, max_length: int | None) -> None:
    """Raises unless a sequence of each dataset has two adjacent tokens in the loss: a mask can predict the second.

    Args:
        train_dataset: Tokenized rows. Not checked if a stream or the user's own function makes them.
        eval_dataset: The same, or a `dict` of several. Without a target, the loss of an evaluation would be 0, the
            best there is.
        max_length (`int`, *optional*): Length to which rows were truncated, for the message.
    """
    for name, dataset in _by_name(train_dataset, eval_dataset).items():
        if not _has_target(dataset):
            raise ValueError(
                f"No sequence of `{name}` has two tokens in a row inside the loss, so there is nothing for a mask to "
                f"predict. Are they all prompt, or did `max_length={max_length}` cut them down to their prompt?"
            )


def _has_target(dataset) -> bool:
    """Whether a mask can predict a token of some row, as far as rows are known before training."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return True
    if "input_ids" not in dataset.column_names:
        return True
    labels = (torch.as_tensor(row.get("labels", row["input_ids"]))[None] for row in dataset)
    return any(useful_anchors(labels_1T, torch.zeros_like(labels_1T)).any() for labels_1T in labels)


def refuse_ids(input_ids: torch.LongTensor, vocab_size: int) -> None:
    """Raises a `ValueError` for token ids of a batch that the base cannot embed."""
    least, most = (int(bound) for bound in input_ids.aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"The batch has token ids from {least} to {most}, but the base's vocabulary has ids 0 to "
            f"{vocab_size - 1}. Was it tokenized with the base's own tokenizer? If tokens were added to that, such as "
            "a pad token, call `resize_token_embeddings` on the base before the upgrade."
        )


def tuner_of(model) -> GatedLoraModel:
    """The tuner inside an upgraded model. Raises a `ValueError` if the model was not upgraded."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, GatedLoraModel):
        raise ValueError(
            f"MTPTrainer trains upgraded models, but got {type(model).__name__}. Upgrade it first with "
            "`model = get_peft_model(model, GatedLoraConfig(k=8))`, or pass `peft_config=GatedLoraConfig(k=8)`."
        )
    return tuner


def refuse_model(args: MTPConfig, model, peft_config=None) -> None:
    """Raises if the model that was passed to the trainer cannot be trained.

    Raises:
        ValueError: It is neither upgraded nor to be upgraded by `peft_config`, or both; it is not trainable; or TRL
            would enlarge its vocabulary before the upgrade.
    """
    if peft_config is None:
        return refuse_parameters(tuner_of(model))
    if isinstance(model, PeftModel):
        upgrade = "Upgrade it with `get_peft_model(model, GatedLoraConfig(...), adapter_name='mtp')`. "
        raise ValueError(
            "The model has an adapter already, and `peft_config` would make another. "
            f"{'' if isinstance(model.base_model, GatedLoraModel) else upgrade}Leave out `peft_config`."
        )
    if not isinstance(peft_config, GatedLoraConfig):
        raise ValueError(f"MTPTrainer needs `peft_config=GatedLoraConfig(...)`, but got {type(peft_config).__name__}.")
    if args.chat_template_path and not args.chat_template_path.endswith((".jinja", ".j2")):
        raise ValueError(
            f"`chat_template_path={args.chat_template_path!r}` is a tokenizer: TRL adds its tokens to the base and "
            "would train their embeddings and `lm_head` along with the adapter, but the base must not change. Pass "
            "only a template (a .jinja file), or add these tokens to the base before the upgrade with "
            "`trl.clone_chat_template`."
        )


def refuse_parameters(tuner: GatedLoraModel) -> None:
    """Raises a `ValueError` unless the active adapter is trainable and nothing else is."""
    if tuner.adapters_disabled:
        raise ValueError(
            "The adapter is disabled, so it cannot be trained. Train outside of `with model.disable_adapter()`, or "
            "call `model.base_model.enable_adapter_layers()` if it was switched off for good."
        )
    trainable = {f"base_model.{name}": p for name, p in tuner.named_parameters() if p.requires_grad}
    own = own_weights(trainable, tuner.active_adapters[0], tuner)
    others = [name.removeprefix("base_model.") for name in trainable if name not in own or "lora_" not in name]
    if not trainable:
        raise ValueError(
            "The adapter is not trainable: it was loaded for inference, or frozen. Load it with "
            "`PeftModel.from_pretrained(base, folder, is_trainable=True)`, or call "
            f"`model.set_adapter({tuner.active_adapters[0]!r})`."
        )
    if others:
        raise ValueError(
            f"MTPTrainer trains only the adapter, but {len(others)} other parameters are trainable, such as "
            f"{others[0]!r}, and would change the base's output. Freeze them with `requires_grad_(False)`."
        )
