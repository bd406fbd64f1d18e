"""[`regenerate_responses`] replaces the responses of a dataset with the model's own."""

import hashlib
import json
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..adapter.base_identity import base_fingerprint, tokenizer_fingerprint
from ..adapter.tuner import GatedLoraTuner
from ..base.inspection import evaluation_mode
from .answers import answer_batch, chosen_end_tokens, pad_token
from .prompts import form_of
from .randomness import fork_rng
from .shard import Shard
from .survey import context_length, survey

logger = logging.get_logger(__name__)

REFUSED = {
    "attention_mask",
    "generation_config",
    "generator",
    "input_ids",
    "inputs",
    "num_return_sequences",
    "return_dict_in_generate",
    "streamer",
}


def regenerate_responses(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    output: str | Path,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 512,
    prompt_tokens: int | None = None,
    seed: int = 0,
    mtp: bool = False,
    do_sample: bool = False,
    **generate_kwargs,
) -> Dataset:
    """Replaces the responses of a dataset with the model's own.

    A draft is accepted if it matches the base, not the data, so an adapter learns most from the base's own text. Pass
    the result directly to [`MTPTrainer`].

    Rows are answered in batches of similar length, the longest first. Each batch is written to disk at once. After an
    interruption, the same call resumes and produces the same file. Under `accelerate launch`, the processes share the
    rows.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The base, or an upgraded model, whose responses are the same.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer, with a chat template if the prompts are conversations.
        dataset ([`~datasets.Dataset`]):
            Rows with a prompt, in any of TRL's forms: `prompt`, a text or a conversation, whose `completion` is
            replaced or added; `messages` (or `conversations`), whose last turn of the assistant is replaced or added;
            or plain `text`, of which `prompt_tokens` are kept. Of several forms the first one counts, and the others,
            with their old responses, are dropped. All other columns stay, and `finish_reason` is added: `"stop"` if
            the model ended its response, `"length"` if `max_new_tokens` cut it off.
        output (`str` or `Path`):
            Folder for the result, JSON Lines that `load_dataset(output)` reads.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of rows per batch and process.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Maximum length of a response.
        prompt_tokens (`int`, *optional*):
            How many tokens of each plain `text` are the prompt. Other forms ignore it.
        seed (`int`, *optional*, defaults to `0`):
            Seed for sampling. Each batch has its own random numbers, so an interruption changes nothing. A different
            batch size or number of processes changes the responses.
        mtp (`bool`, *optional*, defaults to `False`):
            Whether to use multi-token prediction, which needs an upgraded model. Greedy responses stay the same.
            Sampled responses are other samples from the same distribution.
        do_sample (`bool`, *optional*, defaults to `False`):
            Whether to sample, with the settings of the model's generation config or `temperature`, `top_p` and so on.
        generate_kwargs:
            Further arguments of `generate`.

    Returns:
        [`~datasets.Dataset`]: The rows of this process, in their order; with one process, all.

    Raises:
        ValueError: A dataset that is empty, has no prompts, is a stream or a dictionary of splits; conversations
            without a chat template; `mtp=True` for a model that was not upgraded; an output folder with rows that
            were made with other arguments.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from hf_mtp import regenerate_responses

    >>> prompts = load_dataset("trl-lib/Capybara", split="train")
    >>> dataset = regenerate_responses(base, tokenizer, prompts, "own-words", batch_size=64)
    >>> trainer = MTPTrainer(model=model, args=MTPConfig(output_dir="out"), train_dataset=dataset)
    ```
    """
    processes = launched_processes()
    _refuse_dataset(dataset, tokenizer, prompt_tokens, processes.num_processes)
    _refuse_arguments(model, batch_size, max_new_tokens, mtp, generate_kwargs)
    rows = dataset.shard(processes.num_processes, processes.process_index, contiguous=True)
    asked = survey(rows, tokenizer, prompt_tokens, context_length(model) - max_new_tokens, processes)
    options = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, **generate_kwargs}
    options["eos_token_id"] = chosen_end_tokens(model, tokenizer, generate_kwargs.get("eos_token_id"))
    options.setdefault("pad_token_id", pad_token(tokenizer))

    shard = Shard(Path(output), processes.process_index, processes.num_processes)
    shard.claim(
        {
            "model": getattr(model, "name_or_path", ""),
            "weights": base_fingerprint(model),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16],
            "rows": asked.digest,
            "batch_size": batch_size,
            "prompt_tokens": prompt_tokens,
            "seed": seed,
            "mtp": mtp,
            **{name: _as_json(value) for name, value in options.items()},
        }
    )
    if not shard.is_whole:
        seed += len(dataset) * processes.process_index  # no two batches of any process start from the same one
        batches = [asked.order[start : start + batch_size] for start in range(0, len(asked.order), batch_size)]
        done = shard.resume(batch_size)
        with evaluation_mode(model), _Progress(len(asked.order), done * batch_size, processes) as progress:
            for batch in batches[done:]:
                with fork_rng(model, seed + batch[0]):
                    batch_rows = [rows[index] for index in batch]
                    answers = answer_batch(batch_rows, model, tokenizer, prompt_tokens, mtp, options)
                shard.append([answer.row for answer in answers])
                progress.add(len(batch), sum(answer.tokens for answer in answers))
        shard.finish(asked.order)
    return Dataset.from_json(str(shard.path))


def launched_processes() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started, and its device."""
    accelerator = torch.accelerator if hasattr(torch, "accelerator") else torch.cuda
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not accelerator.is_available())


def _refuse_dataset(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int | None, processes: int
) -> None:
    """Raises for rows that nothing can be asked of."""
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        help = f"choose a split, {[*dataset]}" if isinstance(dataset, dict) else "`Dataset.from_generator` makes one"
        raise ValueError(f"`dataset` must be a datasets.Dataset, but got {kind}: {help}.")
    if len(dataset) < processes:
        raise ValueError(
            f"`dataset` has {len(dataset)} row(s), which is too few for {processes} process(es): each "
            "process needs at least one."
        )
    form = form_of(dataset.column_names)
    if (form == "text") != (prompt_tokens is not None):
        raise ValueError(
            f"The prompts are in column {form!r}, and `prompt_tokens` is {prompt_tokens}. It sets how many tokens of "
            "a plain `text` are the prompt: pass it for datasets with a `text` column only."
        )
    if prompt_tokens is not None and prompt_tokens < 1:
        raise ValueError(f"`prompt_tokens` must be at least 1, but got {prompt_tokens}.")
    if tokenizer.chat_template is None and not isinstance(dataset[0][form], str):
        raise ValueError(
            f"Column {form!r} holds conversations, but {tokenizer.name_or_path or 'the tokenizer'} has no chat "
            "template. Set `tokenizer.chat_template`, or pass prompts that are text."
        )


def _refuse_arguments(
    model: PreTrainedModel | PeftModel, batch_size: int, max_new_tokens: int, mtp: bool, generate_kwargs: dict
) -> None:
    """Raises for what cannot be asked of the model."""
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, but got {value}.")
    refused = sorted(REFUSED & generate_kwargs.keys())
    if refused:
        raise ValueError(
            f"{', '.join(map(repr, refused))} cannot be passed on to `generate`, because `regenerate_responses` sets "
            "the batch, the stopping and the seed itself, and every row gets one response. Pass individual "
            "settings, such as `temperature=0.7`."
        )
    if mtp and not isinstance(getattr(model, "base_model", None), GatedLoraTuner):
        raise ValueError(
            f"`mtp=True` needs an upgraded model, but got {type(model).__name__}. Load its adapter with "
            "`PeftModel.from_pretrained(base, adapter)`, or leave out `mtp`: the responses are the same."
        )


def _as_json(value):
    """An argument as JSON returns it. Values that JSON has no type for become the name of their type."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return type(value).__name__


class _Progress:
    """A progress bar over rows, with tokens per second."""

    def __init__(self, rows: int, done: int, processes: PartialState):
        quiet = not processes.is_local_main_process
        self.bar = logging.tqdm(total=rows, initial=done, desc="Responses", unit="row", disable=quiet)
        self.tokens, self.start = 0, time.perf_counter()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def add(self, rows: int, tokens: int) -> None:
        self.tokens += tokens
        self.bar.set_postfix_str(f"{self.tokens / (time.perf_counter() - self.start):.0f} tokens/s", refresh=False)
        self.bar.update(rows)
