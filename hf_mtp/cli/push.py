"""`hf-mtp push`: uploads an adapter to the Hub."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .verb import verb


@verb
def push(
    adapter: Annotated[str, Argument(help="Folder of the adapter.")],
    repo: Annotated[str, Argument(help="Repository on the Hub, such as me/my-model-mtp.")],
    private: Annotated[bool, Option("--private", help="Make the repository private, if it is new.")] = False,
    revision: Annotated[str | None, Option(help="Branch to upload to.")] = None,
    create_pr: Annotated[bool, Option("--create-pr", help="Open a pull request instead.")] = False,
    custom_generate: Annotated[
        bool,
        Option(
            "--custom-generate",
            help="Add the file for `base.generate(custom_generate=REPO)`, so that scripts need not import hf_mtp.",
        ),
    ] = False,
    message: Annotated[str | None, Option(help="Commit message.")] = None,
) -> None:
    """Upload an adapter and its model card to the Hub in one commit.

    The base model is loaded first, to check that the adapter fits it. `hf auth login` stores the token.

    Example:

        hf-mtp push out me/my-model-mtp --private
    """
    from ..pretrained import is_adapter, load_model

    if not is_adapter(adapter):
        raise ValueError(
            f"{adapter} is not an adapter: it has no adapter_config.json. Pass the folder that "
            "`save_pretrained` or `hf-mtp train` wrote."
        )
    commit = load_model(adapter, device="cpu").push_to_hub(
        repo,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        custom_generate=custom_generate,
        card_from=adapter if Path(adapter).is_dir() else None,
    )
    typer.echo(commit.pr_url or commit.commit_url)
