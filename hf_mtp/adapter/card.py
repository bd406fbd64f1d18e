"""The model card of an adapter."""

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .config import GatedLoraConfig
from .custom_generate import CUSTOM_GENERATE

README = "README.md"
# Kinds of bases on the Hub, and the classes of transformers that load them.
AUTO_CLASSES = {"text-generation": "AutoModelForCausalLM", "image-text-to-text": "AutoModelForImageTextToText"}
FOR_TEXT = AUTO_CLASSES["text-generation"]
MARK = "<!-- Written by hf_mtp. Delete this line to keep your own changes when the adapter is saved again. -->"
TAGS = ("hf_mtp", "multi-token-prediction", "speculative-decoding", "lora", "transformers")
_TAG_OF_BASE = "base_model:adapter:"  # by which the Hub finds the adapters of a base
EVALUATION_BEGIN, EVALUATION_END = "<!-- hf_mtp evaluation -->", "<!-- end of hf_mtp evaluation -->"
_LICENSE = ("license", "license_name", "license_link")
PAPER = "https://huggingface.co/papers/2507.11851"

_TEXT = """---
{metadata}
---

# {title}

{mark}

A multi-token prediction adapter for {base_link}, made with [hf_mtp](https://pypi.org/project/hf-mtp/) after [Your LLM
Knows the Future]({paper}). With it, each forward pass of the base model also predicts the {ahead} after the next
one. The base model verifies them before they are returned, so the output is its own.

```python
# pip install hf_mtp
import hf_mtp
{loading}
tokenizer = AutoTokenizer.from_pretrained("{base}")
inputs = tokenizer("Your prompt", return_tensors="pt")
output = model.generate(**inputs, mtp=True, do_sample=False, max_new_tokens=128)
print(tokenizer.decode(output[0]), model.mtp_statistics.tokens_per_pass)
```
{without_import}
| | |
|---|---|
| base model | {base_link} |
| mask tokens (k) | {k} |
| LoRA rank | {r} |
| sampler head | {sampler} |
| n-gram table | {ngrams} |
| training recipe | {recipe} |
| training data | {data} |

## Tokens per forward pass

{measured}

## Limits

The adapter only loads on this base, with its vocabulary and tokenizer. It cannot be merged into the base. In half
precision a longer forward pass may flip a near-tie between two tokens.
"""

_LOADING = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{repo}")"""
# The class above would look for the base in the subfolder, too, and does not know all bases that read images.
_LOADING_IN_TWO_STEPS = """from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{repo}"{subfolder})"""

_WITHOUT_IMPORT = """
A script that has loaded the base does not have to import hf_mtp, if it is installed:

```python
base.generate(**inputs, custom_generate="{repo}", trust_remote_code=True, do_sample=False, max_new_tokens=128)
```
"""


def write_model_card(
    config: GatedLoraConfig,
    folder: str | Path,
    repo: str | None = None,
    tags: Iterable[str] | None = None,
    subfolder: str | None = None,
    license: dict[str, str] | None = None,
    keep_evaluation: bool = False,
    auto_class: str | None = None,
) -> None:
    """Writes `README.md` into `folder`, unless one is there that somebody wrote by hand.

    Args:
        config ([`GatedLoraConfig`]): All that the card says.
        folder (`str` or `Path`): The adapter's folder.
        repo (`str`, *optional*): Name that the card's example loads; the folder's by default.
        tags (`Iterable[str]`, *optional*): Tags of the card beside our own and those of the card that it replaces.
        subfolder (`str`, *optional*): Where in the repository the adapter is.
        license (`dict[str, str]`, *optional*): As [`license_of`] gives it; that of the card it replaces by default.
        keep_evaluation (`bool`, *optional*, defaults to `False`): Whether the results of `evaluate` in the card that
            it replaces are true of this adapter.
        auto_class (`str`, *optional*): Name of the class of transformers that loads the base; that in the card it
            replaces by default.
    """
    readme = Path(folder, README)
    if not is_replaceable(readme):
        return
    before = ModelCard.load(readme) if readme.is_file() else None
    tags, license = [*tags_of(readme), *(tags or ())], license or (license_of(before.data) if before else None)
    auto_class = auto_class or AUTO_CLASSES.get(before.data.pipeline_tag if before else None, FOR_TEXT)
    if Path(folder, CUSTOM_GENERATE).is_dir():
        tags.append(CUSTOM_GENERATE)
    card = render_model_card(config, repo or Path(folder).resolve().name, tags, subfolder, license, auto_class)
    if keep_evaluation and before:
        card.text = card.text.rstrip() + _evaluation_in(before.text)
    card.save(readme)


def render_model_card(
    config: GatedLoraConfig,
    repo: str,
    tags: Iterable[str] = (),
    subfolder: str | None = None,
    license: dict[str, str] | None = None,
    auto_class: str = FOR_TEXT,
) -> ModelCard:
    """The card of an adapter.

    Args:
        config ([`GatedLoraConfig`]): All that the card says.
        repo (`str`): The name that the example loads.
        tags (`Iterable[str]`, *optional*): Tags beside our own.
        subfolder (`str`, *optional*): Where in the repository the adapter is.
        license (`dict[str, str]`, *optional*): As [`license_of`] gives it.
        auto_class (`str`, *optional*): Name of the class of transformers that loads the base.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    base = config.base_model_name_or_path or "the base model"
    on_hub, tags = is_on_hub(base), list(tags)
    metadata = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft",
        pipeline_tag=next(tag for tag, name in AUTO_CLASSES.items() if name == auto_class),
        tags=list(dict.fromkeys([*TAGS, *([f"{_TAG_OF_BASE}{base}"] if on_hub else []), *tags])),
        datasets=[name for name in config.train_datasets if "/" in name] or None,
        **(license or {}),
    )
    needs_no_import = CUSTOM_GENERATE in tags and not subfolder
    loading = _LOADING_IN_TWO_STEPS if subfolder or auto_class != FOR_TEXT else _LOADING
    inside = f', subfolder="{subfolder}"' if subfolder else ""
    return ModelCard(
        _TEXT.format(
            metadata=metadata.to_yaml(),
            title=repo.rpartition("/")[2],
            mark=MARK,
            base=base,
            base_link=f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`",
            paper=PAPER,
            loading=loading.format(repo=repo, base=base, subfolder=inside, auto_class=auto_class),
            without_import=_WITHOUT_IMPORT.format(repo=repo) if needs_no_import else "",
            ahead="token" if config.k == 1 else f"{config.k} tokens",
            k=f"{config.k}, noise tokens of the vocabulary" if config.masks == "noise" else config.k,
            r=config.r,
            sampler="yes" if config.sampler else "no",
            ngrams="none" if config.ngrams is None else f"{len(config.ngrams):,} contexts",
            recipe=config.recipe or "not recorded",
            data=", ".join(config.train_datasets) or "not recorded",
            measured=_measured(config.tokens_per_pass),
        )
    )


def _measured(tokens_per_pass: dict[str, float]) -> str:
    if not tokens_per_pass:
        return "Not measured."
    rows = "\n".join(f"| {domain} | {value:.2f} |" for domain, value in tokens_per_pass.items())
    return f"| domain | tokens per pass |\n|---|---|\n{rows}"


def is_on_hub(base: str) -> bool:
    """Whether the name of a base is that of a repository rather than of a folder."""
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return not Path(base).exists()


def license_of(data: ModelCardData | None) -> dict[str, str]:
    """The license in the metadata of a card, if it has any: its id, and name and link where the id is `other`."""
    found = {name: getattr(data, name, None) for name in _LICENSE}
    return {name: value for name, value in found.items() if value}


def _evaluation_in(text: str) -> str:
    """The results of `evaluate` in a card, with their marks, as they are appended to another."""
    section, end, _ = text.partition(EVALUATION_BEGIN)[2].partition(EVALUATION_END)
    return f"\n\n{EVALUATION_BEGIN}{section}{end}\n" if end else "\n"


def tags_of(readme: Path) -> list[str]:
    """Tags of a card, if there is one. PEFT and TRL have just written theirs, with the base model's own, into it.

    PEFT's tag of the base is left out: ours is the same, except for a base in a local folder, which we do not name. So
    is `custom_generate`, which depends on the files beside the new card.
    """
    tags = ModelCard.load(readme).data.tags if readme.is_file() else None
    return [tag for tag in tags or [] if not tag.startswith(_TAG_OF_BASE) and tag != CUSTOM_GENERATE]


def is_replaceable(readme: Path) -> bool:
    """Whether a README is missing, was written by us, or is what PEFT or TRL writes by itself."""
    if not readme.is_file():
        return True
    text = readme.read_text(encoding="utf-8")
    return MARK in text or "It has been trained using [TRL]" in text or _is_empty_template(text)


def _is_empty_template(text: str) -> bool:
    """Whether a card is the Hub's template with nothing filled in but metadata and PEFT's version."""
    body = text.split("---", 2)[-1] if text.startswith("---") else text
    template = ModelCard.from_template(ModelCardData()).text.splitlines()
    added = [line for line in body.splitlines() if line not in template]
    return bool(body.strip()) and all(line.startswith(("### Framework versions", "- PEFT ")) for line in added)
