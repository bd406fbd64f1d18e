"""Checks all rows before the first one is answered."""

import hashlib
from dataclasses import dataclass

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .prompts import encode_prompt, question_of
from .shard import to_json

logger = logging.get_logger(__name__)


@dataclass
class Survey:
    """What was found: the rows that can be answered, longest prompt first, and a digest of all rows."""

    order: list[int]
    digest: str


def survey(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int | None,
    longest: float,
    processes: PartialState,
) -> Survey:
    """Reads every row once, so that no bad row ends a run after hours.

    Args:
        rows ([`~datasets.Dataset`]): This process's rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        prompt_tokens (`int`, *optional*): How many tokens of a plain text are the prompt.
        longest (`float`): Tokens of a prompt at most.
        processes ([`~accelerate.PartialState`]): The first one shows a bar.

    Raises:
        ValueError: No row can be answered, or a column cannot be written as JSON.
    """
    digest, lengths, empty, too_long = hashlib.sha256(), {}, 0, 0
    quiet = not processes.is_local_main_process
    for index, row in enumerate(logging.tqdm(rows, desc="Reading prompts", unit="row", disable=quiet)):
        digest.update(to_json(row))
        length = len(encode_prompt(question_of(row, tokenizer, prompt_tokens).prompt, tokenizer, row))
        empty += length == 0
        too_long += length > longest
        if 0 < length <= longest:
            lengths[index] = length
    left_out = (
        f"{empty} have an empty prompt, and in {too_long} the prompt plus `max_new_tokens` exceeds the model's "
        "context length"
    )
    if not lengths:
        raise ValueError(
            f"None of the {len(rows)} rows can be answered: {left_out}. Lower `max_new_tokens`, or use "
            "shorter prompts."
        )
    if empty or too_long:
        logger.warning(f"{empty + too_long} of {len(rows)} rows are skipped: {left_out}.")
    return Survey(sorted(lengths, key=lengths.__getitem__, reverse=True), digest.hexdigest()[:16])


def context_length(model: PreTrainedModel | PeftModel) -> float:
    """The model's maximum context length in tokens."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return float("inf") if not limit else limit
