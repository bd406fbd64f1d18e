"""Compares the output of `generate(mtp=True)` with plain decoding, token by token: [`verify`].

Shapes: N sampled texts, L new tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from peft import PeftModel
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from ...base.inspection import evaluation_mode
from ...base.machine import describe_machine
from ...base.randomness import own_randomness
from ...decoding.noise import PositionNoise, draw_seed
from ...decoding.noise_processor import WHOLE_DISTRIBUTION, NoiseProcessor
from ..decoded import checked_config, decode_rows
from ..measures import first_difference
from ..methods import STRATEGIES, DecodingMethod, methods_of
from ..suites.prompts import EncodedPrompt, encode_prompts
from ..suites.suite import Suite, load_suite
from .divergence import Divergence, divergence_at
from .two_sample import p_value

SIGNIFICANT = 0.001  # how often a true equality may be taken for a difference
SAMPLED_TEXTS, SAMPLED_TOKENS = 64, 6  # of the two-sample test, for each sampling method
SEED = 17
GREEDY, SAMPLING = "greedy", "sampling"
DECODES_PLAINLY = "This model decodes plainly here, one token per pass, so there is nothing to compare."
# The base's own distribution, whatever its generation config says.
AT_TEMPERATURE_1 = {"do_sample": True, "temperature": 1.0, **WHOLE_DISTRIBUTION}


@dataclass
class Comparison:
    """One decoding method, compared with plain decoding.

    Args:
        method (`str`): Its name.
        mode (`str`): `"greedy"` or `"sampling"`.
        answers (`int`): Number of answers.
        divergences (`list[Divergence]`): The first difference of each answer that differs.
        refused (`str`, *optional*): Why the model does not support this method. It then has no answers.
    """

    method: str
    mode: str
    answers: int
    divergences: list[Divergence] = field(default_factory=list)
    refused: str | None = None


@dataclass
class VerifyReport:
    """The result of [`verify`].

    Args:
        dtype (`str`): Dtype of the base's weights.
        batch_size (`int`): Maximum number of prompts per call.
        max_new_tokens (`int`): Maximum number of new tokens per answer.
        comparisons (`list[Comparison]`): One for each method, greedy and sampled.
        p_value (`float`, *optional*): Of the two-sample test of sampled texts. `None` without sampling.
        left_out (`dict[str, str]`): Prompts that the model cannot answer, and why.
        machine (`dict`): Processor, threads and versions.
    """

    dtype: str
    batch_size: int
    max_new_tokens: int
    comparisons: list[Comparison]
    p_value: float | None
    left_out: dict[str, str]
    machine: dict

    @property
    def is_equal(self) -> bool:
        """Whether every answer has the token ids of plain decoding, and sampled texts have the base's distribution."""
        return self.is_distributed_equally and not any(comparison.divergences for comparison in self.comparisons)

    @property
    def is_distributed_equally(self) -> bool:
        """Whether sampled texts have the base's distribution, by the two-sample test; also if there was none."""
        return self.p_value is None or self.p_value > SIGNIFICANT

    def to_dict(self) -> dict:
        """The report as JSON would hold it, with `equal` and, for each divergence, `tie`."""
        content = {"equal": self.is_equal, **asdict(self)}
        for comparison, row in zip(self.comparisons, content["comparisons"], strict=True):
            for divergence, entry in zip(comparison.divergences, row["divergences"], strict=True):
                entry["tie"] = divergence.is_tie
        return content


def verify(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite | str = "quick",
    *,
    strategies: Sequence[str] = STRATEGIES,
    k: int | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 64,
    limit: int | None = 2,
    sampling: bool = True,
) -> VerifyReport:
    """Checks that `mtp=True` gives the same output as plain decoding.

    Greedy answers are compared token by token, and so are samples: a logits processor adds the same noise for each
    output position in plain decoding, so both must sample the same tokens. A two-sample test compares outputs sampled
    with the first strategy with outputs that the base samples with its own random numbers.

    Args:
        model ([`~peft.PeftModel`]): An upgraded model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        suite ([`Suite`] or `str`, *optional*, defaults to `"quick"`): The prompts, or the name of a suite.
        strategies (`Sequence[str]`, *optional*): Values of `mtp_strategy`; all three by default.
        k (`int`, *optional*): Value of `mtp_k`; the adapter's k by default.
        batch_size (`int`, *optional*, defaults to 1): Prompts per call of `generate`.
        max_new_tokens (`int`, *optional*, defaults to 64): Maximum number of new tokens per answer.
        limit (`int`, *optional*, defaults to 2): Maximum number of prompts per domain; all if `None`.
        sampling (`bool`, *optional*, defaults to `True`): Whether to compare sampling, too.

    Returns:
        [`VerifyReport`]

    Raises:
        ValueError: The model has no adapter of hf_mtp, an argument is out of range, no prompt can be answered, or the
            model allows none of the strategies.
    """
    config = checked_config(model, batch_size, max_new_tokens)
    suite = (load_suite(suite) if isinstance(suite, str) else suite).limited(limit)
    encoded, left_out = encode_prompts(suite.prompts, tokenizer, model.config, max_new_tokens)
    batches = [encoded[start : start + batch_size] for start in range(0, len(encoded), batch_size)]
    ks = [config.k if k is None else k]
    methods = [method for method in methods_of(strategies, ks, config.k) if method.k is not None]
    comparisons, sampled = [], None
    with evaluation_mode(model):
        for mode in (GREEDY, SAMPLING) if sampling else (GREEDY,):
            comparisons += _compare_all(model, methods, batches, mode, max_new_tokens)
        refused = {comparison.method for comparison in comparisons if comparison.refused}
        allowed = [method for method in methods if method.name not in refused]
        if not allowed:
            raise ValueError(
                f"Nothing could be compared: the model supports none of these methods. {comparisons[0].refused}"
            )
        if sampling:
            sampled = _two_sample(model, allowed[0], encoded[0])
    dtype = str(model.get_base_model().dtype).removeprefix("torch.")
    return VerifyReport(dtype, batch_size, max_new_tokens, comparisons, sampled, left_out, describe_machine())


def _compare_all(
    model: PeftModel, methods: list[DecodingMethod], batches: list[list[EncodedPrompt]], mode: str, max_new_tokens: int
) -> list[Comparison]:
    """Decodes every batch with plain decoding and with every method."""
    found = {method: Comparison(method.name, mode, 0) for method in methods}
    for batch in batches:
        ids = [prompt.ids for prompt in batch]
        noises = _noises(model, len(batch)) if mode == SAMPLING else None
        plain = decode_rows(model, ids, max_new_tokens, **_plain_options(noises, ids)).rows
        for method, comparison in found.items():
            if comparison.refused:
                continue
            try:
                decoded = decode_rows(model, ids, max_new_tokens, **_options(method, mode))
            except NotImplementedError as error:
                comparison.refused = " ".join(str(error).split())
                continue
            if not decoded.is_mtp:
                comparison.refused = DECODES_PLAINLY
                continue
            comparison.answers += len(decoded.rows)
            comparison.divergences += _divergences(model, batch, plain, decoded.rows, noises)
    return list(found.values())


def _options(method: DecodingMethod, mode: str) -> dict:
    if mode == GREEDY:
        return method.options
    return {**method.options, **AT_TEMPERATURE_1, "generator": torch.Generator().manual_seed(SEED)}


def _noises(model: PeftModel, rows: int) -> list[PositionNoise]:
    """The noise of each row that `generate(mtp=True)` draws from a generator with our seed."""
    head = model.get_base_model().get_output_embeddings()
    seed = draw_seed(torch.Generator().manual_seed(SEED))
    return [PositionNoise(seed, row, head.weight.shape[0], head.weight.device) for row in range(rows)]


def _plain_options(noises: list[PositionNoise] | None, ids: list[list[int]]) -> dict:
    if noises is None:
        return {}
    return {"logits_processor": LogitsProcessorList([NoiseProcessor(noises, max(map(len, ids)))])}


def _divergences(
    model: PeftModel,
    batch: list[EncodedPrompt],
    plain: list[list[int]],
    rows: list[list[int]],
    noises: list[PositionNoise] | None,
) -> list[Divergence]:
    found = []
    for index, (prompt, expected, ids) in enumerate(zip(batch, plain, rows, strict=True)):
        place = first_difference(expected, ids)
        if place is not None:
            noise_V = None if noises is None else noises[index].at(place)
            base = model.get_base_model()
            found.append(divergence_at(base, prompt.name, prompt.ids, expected, ids, place, noise_V))
    return found


def _two_sample(model: PeftModel, method: DecodingMethod, prompt: EncodedPrompt) -> float:
    """The p-value of texts sampled with `mtp=True` against texts that the base draws by its own random numbers."""
    samples = []
    for options in ({}, {**method.options, "generator": torch.Generator().manual_seed(SEED)}):
        many = {**AT_TEMPERATURE_1, "num_return_sequences": SAMPLED_TEXTS, **options}
        with own_randomness(SEED):
            rows = decode_rows(model, [prompt.ids], SAMPLED_TOKENS, **many).rows
        samples.append(torch.tensor([row + [-1] * (SAMPLED_TOKENS - len(row)) for row in rows]))
    return p_value(*samples)
