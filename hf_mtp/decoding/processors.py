"""Logits processors and stopping criteria: the order of verification in which they work as in plain decoding.

Plain decoding calls each processor and criterion once per token, with all rows of the batch at the same length. With
several tokens per pass, rows advance at different speeds. Processors that depend on the scores alone are not affected,
and most of transformers' own work row by row. All others are called exactly as in plain decoding, with all rows in
step.
"""

import enum
from copy import copy

import torch
from transformers import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, logits_process
from transformers.generation import stopping_criteria as stopping_criteria_module

# Processors that depend on the scores alone, and not on the tokens before them.
OF_SCORES_ALONE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper) + tuple(
    getattr(logits_process, name)
    for name in (
        "MinPLogitsWarper",
        "TopHLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "LogitNormalization",
        "InfNanRemoveLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    )
    if hasattr(logits_process, name)
)
# Criteria that depend on the last token, the length or the time alone.
OF_TOKENS_ALONE = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)
# Processors of transformers that remember earlier calls.
KEEPS_STATE = {"SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor"}
# Attributes of transformers' processors with one entry per prompt, or per row of the batch. With
# `num_return_sequences`, several consecutive rows have the same prompt.
PER_PROMPT = {"prompt_ignore_length", "encoder_input_ids", "generated_ngrams"}


class Order(enum.Enum):
    """The order in which the tokens of a pass are verified."""

    TOGETHER = "all rows and positions at once"
    BY_ROW = "each row by itself, position by position"
    IN_STEP = "position by position, all rows in step"


def order_of(processors: LogitsProcessorList, criteria: StoppingCriteriaList, rows: int) -> Order:
    """The fastest order in which every processor and criterion works as in plain decoding.

    Args:
        processors ([`~transformers.LogitsProcessorList`]), criteria ([`~transformers.StoppingCriteriaList`]): As
            `generate` prepared them.
        rows (`int`): B.
    """
    if all(type(p) in OF_SCORES_ALONE for p in processors) and all(type(c) in OF_TOKENS_ALONE for c in criteria):
        return Order.TOGETHER
    if rows == 1:
        return Order.BY_ROW
    is_known = all(_is_transformers_own(p, logits_process) for p in processors) and all(
        _is_transformers_own(c, stopping_criteria_module) for c in criteria
    )
    keeps_state = any(type(p).__name__ in KEEPS_STATE for p in processors)
    # Without an end-of-sequence token, rows that stopped go on until all have stopped.
    others_go_on = not has_end_token(criteria) and any(type(c) not in OF_TOKENS_ALONE for c in criteria)
    return Order.BY_ROW if is_known and not keeps_state and not others_go_on else Order.IN_STEP


def _is_transformers_own(processor, module) -> bool:
    return type(processor).__module__ == module.__name__


def has_end_token(criteria: StoppingCriteriaList) -> bool:
    """Whether plain decoding would pad rows that ended."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)


def end_tokens_of(criteria: StoppingCriteriaList) -> set[int]:
    """Tokens that end a row."""
    return {token for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.flatten().tolist()}


def most_new_tokens(criteria: StoppingCriteriaList, prompt: int) -> int:
    """The most new tokens after `prompt` tokens, by the shortest length limit; at least one, as in plain decoding."""
    return max(1, min(c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)) - prompt)


def processors_of_row(processors: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """Copies of transformers' processors for one row of a batch of `rows`."""
    return processors if rows == 1 else LogitsProcessorList(_of_row(each, row, rows) for each in processors)


def _of_row(processor, row: int, rows: int):
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed, prompt = processor._prefix_allowed_tokens_fn, row // processor._num_beams
        return PrefixConstrainedLogitsProcessor(lambda _, prefix: allowed(prompt, prefix), 1)
    own = copy(processor)
    for name in PER_PROMPT & vars(own).keys():
        value = getattr(own, name)
        if isinstance(value, torch.Tensor | list):
            place = row * len(value) // rows
            setattr(own, name, value[place : place + 1])
    if "batch_size" in vars(own):
        own.batch_size = 1
    return own
