"""The command line of [`regenerate_responses`].

    python -m hf_mtp.cli.regenerate --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --output own-words
    accelerate launch -m hf_mtp.cli.regenerate ...    # several processes, each with its share of the rows

The output folder contains JSON Lines files for `load_dataset`. Repeat the same command to resume an interrupted run.
"""

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..data.responses import launched_processes, regenerate_responses

SAMPLING = ("temperature", "top_p", "top_k")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; that of the process if `arguments` is `None`."""
    parser = argparse.ArgumentParser(
        prog="hf-mtp-regenerate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hub id or folder of a base model or of an adapter")
    parser.add_argument("--dataset", required=True, help="Hub id, folder, or JSON Lines file")
    parser.add_argument("--config", help="configuration of the dataset, if it has several")
    parser.add_argument("--split", default="train", help="split of the dataset (%(default)s)")
    parser.add_argument("--output", required=True, type=Path, help="folder for the result")
    parser.add_argument("--rows", type=int, help="number of rows to use, from the first (all)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows at a time, per process (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="most tokens per response (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, help="for plain texts, the number of tokens that form the prompt")
    parser.add_argument("--do-sample", action="store_true", help="sample instead of decoding greedily")
    for name in SAMPLING:
        kind = int if name == "top_k" else float
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="with --do-sample, as in generate")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling (%(default)s)")
    parser.add_argument("--mtp", action="store_true", help="multi-token prediction; --model must be an adapter")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights, such as bfloat16 (%(default)s)")
    args = parser.parse_args(arguments)
    if not args.do_sample and any(getattr(args, name) is not None for name in SAMPLING):
        parser.error("--temperature, --top-p and --top-k need --do-sample")
    return args


def load_rows(name: str, config: str | None, split: str) -> Dataset:
    """Loads a dataset from the Hub, from a folder of `save_to_disk`, or from a JSON Lines file."""
    path = Path(name)
    if path.is_file():
        return load_dataset("json", data_files=str(path), split="train")
    if (path / "state.json").is_file():
        return load_from_disk(name)
    if (path / "dataset_dict.json").is_file():
        return load_from_disk(name)[split]
    return load_dataset(name, config, split=split)


def load_model(name: str, dtype: str) -> PreTrainedModel | PeftModel:
    """Loads a base model, or an adapter together with its base, from a Hub id or a path."""
    kind = AutoModelForCausalLM if find_adapter_config_file(name) is None else AutoPeftModelForCausalLM
    return kind.from_pretrained(name, dtype=dtype).to(launched_processes().device)


def load_tokenizer(name: str, model: PreTrainedModel | PeftModel) -> AutoTokenizer:
    """Loads the tokenizer of a model, or of the base of an adapter. `model` was loaded from `name`."""
    return AutoTokenizer.from_pretrained(model.name_or_path if isinstance(model, PeftModel) else name)


def main() -> None:
    """Runs the command."""
    args = parse_args()
    rows = load_rows(args.dataset, args.config, args.split)
    if args.rows is not None:
        rows = rows.take(min(args.rows, len(rows)))
    model = load_model(args.model, args.dtype)
    regenerate_responses(
        model,
        load_tokenizer(args.model, model),
        rows,
        args.output,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        prompt_tokens=args.prompt_tokens,
        seed=args.seed,
        mtp=args.mtp,
        do_sample=args.do_sample,
        **{name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None},
    )


if __name__ == "__main__":
    main()
