"""`hf-mtp train`: trains an adapter, by flags or a YAML file, as TRL's commands do."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from .verb import verb

if TYPE_CHECKING:
    from accelerate import Accelerator

USAGE = "hf-mtp train --model MODEL --dataset DATASET [--config FILE] [--FIELD VALUE ...]"


@dataclass
class UpgradeArguments:
    """What to train, besides the fields of [`MTPConfig`].

    Args:
        model (`str`): Hub id or folder of the base.
        dataset (`str`): Hub id, folder, or JSON Lines file.
        dataset_config (`str`, *optional*): Its configuration, if it has several.
        split (`str`): Its split.
        k (`int`), r (`int`), lora_alpha (`int`, *optional*), masks (`str`), sampler (`bool`): Those of
            [`GatedLoraConfig`].
        dtype (`str`): Dtype of the base.
    """

    model: str = field(metadata={"help": "Hub id or folder of the base model."})
    dataset: str = field(metadata={"help": "Hub id, folder, or JSON Lines file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    k: int = field(
        default=8, metadata={"help": "Masks per block: how many tokens beyond the next one the model predicts."}
    )
    r: int = field(default=128, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Numerator of the LoRA scale. By default that of GatedLoraConfig."}
    )
    masks: str = field(default="learned", metadata={"help": "How masks are embedded: 'learned' or 'noise'."})
    sampler: bool = field(default=True, metadata={"help": "Whether drafts come from a sampler head."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the base, such as bfloat16."})


@verb
def train(
    context: typer.Context,
    list_fields: Annotated[bool, Option("--list-fields", help="List all fields with their defaults.")] = False,
) -> None:
    """Train an adapter. Every field of MTPConfig (an SFTConfig) is a flag, and --config reads flags from a YAML file.

    --model and --dataset are required. --k, --r, --lora_alpha, --masks and --no_sampler are those of GatedLoraConfig.
    --list-fields lists all flags. For several GPUs, use `accelerate launch -m hf_mtp.cli.train`.
    --resume_from_checkpoint true resumes from the newest checkpoint.

    Example:

        hf-mtp train --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --output_dir out --max_steps 1000
    """
    from trl import TrlParser

    from ..adapter.config import GatedLoraConfig
    from ..data.rows import load_rows
    from ..pretrained import default_device, is_upgraded, load_model, load_tokenizer
    from ..training.config import MTPConfig

    parser = TrlParser([UpgradeArguments, MTPConfig], prog="hf-mtp train", usage=USAGE)
    if default_device().type == "cpu":  # else the default dtype of a trainer is an error
        parser.set_defaults(use_cpu=True)
    if list_fields:
        parser.print_help()
        return
    try:
        asked, config = parser.parse_args_and_config(context.args)
    except ValueError as error:  # a field that neither class has, or a value that one refuses
        raise typer.BadParameter(str(error)) from error
    scale = {} if asked.lora_alpha is None else {"lora_alpha": asked.lora_alpha}
    upgrade = GatedLoraConfig(k=asked.k, r=asked.r, masks=asked.masks, sampler=asked.sampler, **scale)
    rows = load_rows(asked.dataset, asked.dataset_config, asked.split)
    base = load_model(asked.model, asked.dtype, device="cpu")
    if is_upgraded(base):
        raise ValueError(
            f"{asked.model} is an adapter of hf_mtp, and this command trains a new one on a base. Pass its base with "
            f"--model ({base.get_base_model().name_or_path}). To resume an interrupted training, add "
            "--resume_from_checkpoint."
        )
    accelerator = _trained(base, upgrade, config, rows, load_tokenizer(asked.model, base))
    # A process that exits before its communication threads may be aborted. They end with the process group, once the
    # wrapped model, which the trainer held, is gone.
    accelerator.free_memory()
    accelerator.end_training()
    typer.echo(f"The adapter is in {config.output_dir}. Try it: hf-mtp generate {config.output_dir} 'Your prompt'")


def _trained(base, upgrade, config, rows, tokenizer) -> "Accelerator":
    """Trains, saves and, if the config says so, pushes an adapter. Returns what held the processes together."""
    from peft import get_peft_model

    from ..training.trainer import MTPTrainer

    trainer = MTPTrainer(
        model=get_peft_model(base, upgrade), args=config, train_dataset=rows, processing_class=tokenizer
    )
    resume = config.resume_from_checkpoint  # a path, or, from the command line, the text "true"
    trainer.train(resume_from_checkpoint=str(resume).lower() == "true" or resume)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()
    return trainer.accelerator


if __name__ == "__main__":
    from .verb import run_alone

    run_alone(train)
