"""Measures an adapter: every prompt of a suite decoded with every method in turn. Knows nothing of tables or plots."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ...base.inspection import evaluation_mode
from ...base.padding import end_tokens
from ...objective.simulation import SimulatedDecoding
from ..decoded import DecodedRows, checked_config, decode_rows
from ..measures import ALL, first_difference, repeated_share
from ..methods import PLAIN, PROMPT_LOOKUP, STRATEGIES, DecodingMethod, methods_of
from ..run import describe_run
from ..suites.prompts import EncodedPrompt, encode_prompts, tokens_fingerprint
from ..suites.suite import Suite, load_suite
from .folder import RunFolder
from .results import Answer, Call, Results, Settings, summarize_calls
from .simulated import simulated_decoding

WARM_UP_TOKENS = 24


def evaluate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite | str = "quick",
    *,
    strategies: Sequence[str] = STRATEGIES,
    k: Sequence[int] | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 128,
    limit: int | None = None,
    output: str | Path | None = None,
) -> Results:
    """Measures tokens per pass and speed over domains, k and strategies, against plain decoding and prompt lookup.

    Decodes greedily until the end-of-sequence token. Each prompt is decoded with every method before the next one, in
    rotating order, so if the machine slows down, all methods are affected alike. With `output`, every finished prompt
    is stored: after an interrupt, the same call resumes.

    Args:
        model ([`~peft.PeftModel`]): An upgraded model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        suite ([`Suite`] or `str`, *optional*, defaults to `"quick"`): The prompts, or the name of a suite as for
            [`load_suite`].
        strategies (`Sequence[str]`, *optional*): Values of `mtp_strategy`; all three by default.
        k (`Sequence[int]`, *optional*): Values of `mtp_k`, for every strategy. By default the adapter's k, and for
            `"quadratic"` also 1, 4 and 8, the paper's, as far as they are smaller.
        batch_size (`int`, *optional*, defaults to 1): Prompts per call of `generate`, all of one domain.
        max_new_tokens (`int`, *optional*, defaults to 128): Maximum number of new tokens per answer.
        limit (`int`, *optional*): Maximum number of prompts per domain.
        output (`str` or `Path`, *optional*): Folder for `results.json`. Nothing is written if `None`.

    Returns:
        [`Results`]. After an interrupt by Ctrl-C they have what is done, with `complete=False`.

    Raises:
        ValueError: The model has no adapter of hf_mtp, an argument is out of range, no prompt fits into the context,
            or `output` has the results of another run.
    """
    config = checked_config(model, batch_size, max_new_tokens)
    suite = (load_suite(suite) if isinstance(suite, str) else suite).limited(limit)
    prompts, left_out = encode_prompts(suite.prompts, tokenizer, model.config, max_new_tokens)
    methods = methods_of(strategies, k, config.k)
    settings = Settings(
        **describe_run(model, suite),
        methods=[{"name": method.name, "strategy": method.strategy, "k": method.k} for method in methods],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    settings.suite["tokens"] = tokens_fingerprint(prompts)
    folder = RunFolder(None if output is None else Path(output), settings)
    if folder.finished is not None:
        return folder.finished
    with evaluation_mode(model):
        results = _run(model, methods, _batches(prompts, batch_size), folder, left_out)
        if results.complete and DecodingMethod("quadratic", config.k).name in results.warm_up:
            results.simulated = _simulated(model, prompts, results)
    if folder.folder is not None:
        results.save(folder.folder)
        if results.complete:
            folder.finish()
    return results


def _batches(prompts: list[EncodedPrompt], size: int) -> list[list[EncodedPrompt]]:
    """Prompts of one domain in batches, and a batch of each domain in turn, so that part of a run is balanced."""
    domains: dict[str, list[EncodedPrompt]] = {}
    for prompt in prompts:
        domains.setdefault(prompt.domain, []).append(prompt)
    numbered = [
        (start, rows[start : start + size]) for rows in domains.values() for start in range(0, len(rows), size)
    ]
    return [rows for _, rows in sorted(numbered, key=lambda item: item[0])]


def _run(
    model: PeftModel,
    methods: list[DecodingMethod],
    batches: list[list[EncodedPrompt]],
    folder: RunFolder,
    left_out: dict[str, str],
) -> Results:
    """Warms up, and decodes what is not yet in the folder."""
    load, complete = _load_average(), False
    warm_up: dict[str, float] = {}
    try:
        fullest = max(batches, key=len)  # transformers' prompt lookup, for one, refuses more than one row
        methods, warm_up = _warmed_up(model, methods, fullest, left_out)
        for number, batch in enumerate(tqdm(batches, unit="prompts", disable=None)):
            if _names(batch) not in folder.turns:
                start = time.perf_counter()
                calls = _turn(model, methods, batch, number, folder.settings.max_new_tokens)
                folder.add(calls, time.perf_counter() - start)
        complete = True
    except KeyboardInterrupt:
        pass  # what is done is kept
    calls = [call for batch in batches for call in folder.turns.get(_names(batch), ())]
    domains = summarize_calls(calls) if calls else {}
    return Results(folder.settings, complete, warm_up, left_out, folder.seconds, load, domains, calls=calls)


def _names(batch: list[EncodedPrompt]) -> tuple[str, ...]:
    return tuple(prompt.name for prompt in batch)


def _simulated(model: PeftModel, prompts: list[EncodedPrompt], results: Results) -> dict[str, float]:
    """Simulated tokens per pass of the plain answers, by domain."""
    ids = {prompt.name: prompt.ids for prompt in prompts}
    texts: dict[str, list[tuple[list[int], list[int]]]] = {}
    for call in results.calls:
        if call.method == PLAIN:
            texts.setdefault(call.domain, []).extend((ids[answer.prompt], answer.ids) for answer in call.answers)
    simulated = {domain: simulated_decoding(model, pairs) for domain, pairs in texts.items()}
    if len(simulated) > 1:
        simulated[ALL] = sum(simulated.values(), SimulatedDecoding())
    return {domain: counts.tokens_per_pass for domain, counts in simulated.items() if counts.passes}


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _warmed_up(
    model: PeftModel, methods: list[DecodingMethod], batch: list[EncodedPrompt], left_out: dict[str, str]
) -> tuple[list[DecodingMethod], dict[str, float]]:
    """The methods that work, and the seconds of each one's first call. Those that do not are added to `left_out`."""
    working, seconds = [], {}
    for method in methods:
        try:
            decoded = decode_rows(model, [prompt.ids for prompt in batch], WARM_UP_TOKENS, **method.options)
        except Exception as error:
            # Our own strategies say what they do not support; transformers' prompt lookup raises anything.
            if method.strategy != PROMPT_LOOKUP and not isinstance(error, ValueError | NotImplementedError):
                raise
            if method.strategy == PLAIN:
                raise
            left_out[method.name] = " ".join(str(error).split())
            continue
        working.append(method)
        seconds[method.name] = round(decoded.seconds, 4)
    return working, seconds


def _turn(
    model: PeftModel, methods: list[DecodingMethod], batch: list[EncodedPrompt], number: int, max_new_tokens: int
) -> list[Call]:
    """Decodes a batch with every method. Each turn starts with another one."""
    first = number % len(methods)
    in_turn = [*methods[first:], *methods[:first]]
    ids = [prompt.ids for prompt in batch]
    decoded = {method.name: decode_rows(model, ids, max_new_tokens, **method.options) for method in in_turn}
    ends = end_tokens(model)
    return [_call(method.name, batch, decoded[method.name], decoded[PLAIN], ends) for method in methods]


def _call(method: str, batch: list[EncodedPrompt], decoded: DecodedRows, plain: DecodedRows, ends: list[int]) -> Call:
    answers = []
    for prompt, ids, expected in zip(batch, decoded.rows, plain.rows, strict=True):
        difference = first_difference(ids, expected)
        answers.append(
            Answer(
                prompt=prompt.name,
                prompt_tokens=len(prompt.ids),
                tokens=len(ids),
                ended=ids[-1] in ends,
                first_difference=difference,
                repeated_4grams=round(repeated_share(ids), 4),
                ids=ids if difference is not None or method == PLAIN else None,
            )
        )
    return Call(
        domain=batch[0].domain,
        method=method,
        seconds=round(decoded.seconds, 6),
        forward_passes=decoded.forward_passes,
        row_passes=decoded.row_passes,
        drafted_per_position=decoded.drafted_per_position,
        accepted_per_position=decoded.accepted_per_position,
        answers=answers,
    )
