"""`hf-mtp regenerate`: the command line of [`regenerate_responses`].

accelerate launch -m hf_mtp.cli.regenerate ...    # several processes, each with its share of the rows
"""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from .verb import run_alone, verb


@verb
def regenerate(
    model: Annotated[str, Option(help="Hub id or folder of a base model or of an adapter.")],
    dataset: Annotated[str, Option(help="Hub id, folder, or JSON Lines file.")],
    output: Annotated[Path, Option(help="Folder for the result.")],
    config: Annotated[str | None, Option(help="Configuration of the dataset, if it has several.")] = None,
    split: Annotated[str, Option(help="Split of the dataset.")] = "train",
    rows: Annotated[int | None, Option(min=1, help="Number of rows to use, from the first. All by default.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Rows at a time, per process.")] = 16,
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum number of tokens per response.")] = 512,
    prompt_tokens: Annotated[
        int | None, Option(min=1, help="For plain texts: number of tokens that form the prompt.")
    ] = None,
    do_sample: Annotated[bool, Option("--do-sample", help="Sample instead of decoding greedily.")] = False,
    temperature: Annotated[float | None, Option(help="With --do-sample, as in generate.")] = None,
    top_p: Annotated[float | None, Option(help="With --do-sample, as in generate.")] = None,
    top_k: Annotated[int | None, Option(help="With --do-sample, as in generate.")] = None,
    seed: Annotated[int, Option(help="Seed for sampling.")] = 0,
    mtp: Annotated[bool, Option("--mtp", help="Use multi-token prediction. The model must be an adapter.")] = False,
    dtype: Annotated[str, Option(help="Dtype of the weights, such as bfloat16.")] = "auto",
) -> None:
    """Replace the responses of a dataset with the model's own: the best training data for its adapter.

    The output folder contains JSON Lines files for load_dataset. After an interruption, the same command resumes.

    Example:

        hf-mtp regenerate --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --output own-words
    """
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if sampling and not do_sample:
        raise typer.BadParameter("--temperature, --top-p and --top-k need --do-sample.")
    from ..data.responses import launched_processes, regenerate_responses
    from ..data.rows import load_rows
    from ..pretrained import load_model, load_tokenizer

    loaded = load_rows(dataset, config, split)
    if rows is not None:
        loaded = loaded.take(min(rows, len(loaded)))
    loaded_model = load_model(model, dtype, launched_processes().device)
    regenerate_responses(
        loaded_model,
        load_tokenizer(model, loaded_model),
        loaded,
        output,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        prompt_tokens=prompt_tokens,
        seed=seed,
        mtp=mtp,
        do_sample=do_sample,
        **sampling,
    )


def main() -> None:
    """Runs the verb as the command `hf-mtp-regenerate`."""
    run_alone(regenerate)


if __name__ == "__main__":
    main()
