"""Measures how well a model predicts tokens beyond the next one: the ranks of its own future tokens ([`probe`]).

Shapes: T tokens, M masks, A blocks, k masks per block, D features, E size of an embedding. Texts have one row.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...adapter.config import GatedLoraConfig
from ...adapter.tuner import GatedLoraTuner
from ...base.inspection import evaluation_mode, input_device
from ...base.randomness import own_randomness
from ...layout.blocks import IGNORE, BlockLayout, training_layout
from ...objective.compute import drafted_features
from ...passes.training_pass import TrainingPass, training_pass
from ..decoded import checked_config, decode_rows
from ..run import describe_run, make_folder, refuse_other_run
from ..suites.prompts import EncodedPrompt, encode_prompts
from ..suites.suite import Suite, load_suite
from .placeholders import Placeholder, placeholders_of
from .results import FILE, ProbedText, ProbeResults, ProbeSettings, load_probe, summaries_of, token_ranks

AHEAD = 8  # placeholders of a base without an adapter
MASKS_PER_CHUNK = 512
MASKS = "masks"
SAMPLER, SAMPLER_ALONE = "sampler, true tokens before", "sampler, own drafts before"


def probe(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite | str = "quick",
    *,
    max_new_tokens: int = 64,
    limit: int | None = 2,
    output: str | Path | None = None,
) -> ProbeResults:
    """Measures how well a model predicts tokens beyond the next one.

    The base answers prompts greedily. After every token of an answer, k extra positions are appended, whose logits
    predict the tokens after the next one. The rank of the true token shows how well. The content of these positions is
    the *source* of the predictions: placeholders, with the untouched base; the adapter's masks; or masks followed by
    the sampler head, which sees the true previous token or its own draft. The paper shows the first two in its figures
    1 and 2 (Samragh et al., arXiv 2507.11851).

    Args:
        model ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]): An upgraded model; or a base alone, for which
            only placeholders are measured, 8 in a block.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        suite ([`Suite`] or `str`, *optional*, defaults to `"quick"`): The prompts, or the name of a suite as for
            [`load_suite`].
        max_new_tokens (`int`, *optional*, defaults to 64): Maximum number of new tokens per answer.
        limit (`int`, *optional*, defaults to 2): Maximum number of prompts per domain; all if `None`.
        output (`str` or `Path`, *optional*): Folder for `probe.json`. Nothing is written if `None`.

    Returns:
        [`ProbeResults`]

    Raises:
        ValueError: The model's adapter is not one of hf_mtp, an argument is out of range, no prompt fits into the
            context or has an answer of two tokens, or `output` has the results of another run.
        OSError: `output` is a file, or cannot be made.
    """
    if not isinstance(model, PeftModel):
        with _upgraded(model) as alone:
            return _probe(alone, tokenizer, suite, max_new_tokens, limit, output, has_adapter=False)
    return _probe(model, tokenizer, suite, max_new_tokens, limit, output, has_adapter=True)


@contextmanager
def _upgraded(base: PreTrainedModel) -> Iterator[PeftModel]:
    """A base as an upgraded model, whose adapter is not used. Afterwards, the base is as it was."""
    trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    with own_randomness(0):
        model = get_peft_model(base, GatedLoraConfig(k=AHEAD, r=1, sampler=False))
    try:
        yield model
    finally:
        model.unload()
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in trainable)


def _probe(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite | str,
    max_new_tokens: int,
    limit: int | None,
    output: str | Path | None,
    has_adapter: bool,
) -> ProbeResults:
    config = checked_config(model, 1, max_new_tokens)
    suite = (load_suite(suite) if isinstance(suite, str) else suite).limited(limit)
    described = describe_run(model, suite)
    if not has_adapter:
        described["adapter"] = None
    settings = ProbeSettings(**described, k=config.k, max_new_tokens=max_new_tokens)
    folder = None if output is None else Path(output)
    if folder is not None and (folder / FILE).is_file():
        refuse_other_run(folder, settings, load_probe(folder).settings)
    room = max_new_tokens + config.k  # the last positions stand for tokens after the answer
    prompts, left_out = encode_prompts(suite.prompts, tokenizer, model.config, room)
    if folder is not None:
        make_folder(folder)
    results = _measured(model, tokenizer, prompts, settings, left_out)
    if folder is not None:
        results.save(folder)
    return results


def _measured(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[EncodedPrompt],
    settings: ProbeSettings,
    left_out: dict[str, str],
) -> ProbeResults:
    """Answers every prompt and ranks the tokens of its answer."""
    start, texts = time.perf_counter(), []
    with evaluation_mode(model):
        placeholders, missing = placeholders_of(model.get_base_model(), tokenizer)
        for prompt in tqdm(prompts, unit="prompts", disable=None):
            answer = decode_rows(model, [prompt.ids], settings.max_new_tokens).rows[0]
            if len(answer) < 2:
                left_out[prompt.name] = "Its answer has only one token, so there is no token after the next one."
                continue
            ranks = text_ranks(model.base_model, prompt.ids, answer, placeholders, settings.adapter is not None)
            texts.append(ProbedText(prompt.name, prompt.domain, len(prompt.ids), answer, ranks))
    if not texts:
        raise ValueError(
            "No answer has two tokens, so there is no token after the next one to predict. Pass other prompts, or a "
            f"larger `max_new_tokens` than {settings.max_new_tokens}."
        )
    seconds, names = round(time.perf_counter() - start, 2), [one.name for one in placeholders]
    return ProbeResults(settings, {**missing, **left_out}, seconds, names, summaries_of(texts), texts)


@torch.no_grad()
def text_ranks(
    tuner: GatedLoraTuner,
    prompt: Sequence[int],
    answer: Sequence[int],
    placeholders: Sequence[Placeholder],
    with_masks: bool = True,
) -> dict[str, list[list[int]]]:
    """The ranks of the tokens of an answer, by source of the guesses, as in [`ProbedText`].

    Args:
        tuner ([`GatedLoraTuner`]): The upgraded model, in evaluation mode.
        prompt (`Sequence[int]`): Tokens before the answer, at least one.
        answer (`Sequence[int]`): At least two tokens.
        placeholders (`Sequence[Placeholder]`): What the untouched base reads.
        with_masks (`bool`, *optional*, defaults to `True`): Whether to measure the adapter's masks, too.
    """
    ids_1T = torch.tensor([[*prompt, *answer]], device=input_device(tuner.model))
    labels_1T = ids_1T.clone()
    labels_1T[:, : len(prompt)] = IGNORE
    position_1T = torch.arange(ids_1T.shape[1], device=ids_1T.device)[None]
    layout = training_layout(labels_1T, position_1T, torch.zeros_like(ids_1T), tuner.active_mtp_config.k)
    states = training_pass(tuner, ids_1T, layout, all_layers=False, masks=MASKS_PER_CHUNK)
    found: dict[str, list[list[int]]] = {}
    for chunk in states.chunks:
        for source, hidden_1MD in _guesses(tuner, states, chunk, ids_1T, placeholders, with_masks):
            found.setdefault(source, []).extend(_ranks_by_block(tuner, chunk, labels_1T, hidden_1MD))
    return found


def _guesses(
    tuner: GatedLoraTuner,
    states: TrainingPass,
    chunk: BlockLayout,
    ids_1T: torch.LongTensor,
    placeholders: Sequence[Placeholder],
    with_masks: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each source, and its features `(1, M, D)` for the unembedding."""
    for placeholder in placeholders:
        yield placeholder.name, placeholder.states(states, chunk, ids_1T)
    if with_masks:
        mask_1MD = states.masks(chunk)[-1]
        yield MASKS, mask_1MD
        if tuner.sampler_head() is not None:
            yield SAMPLER, drafted_features(tuner, ids_1T, chunk, mask_1MD)
            yield SAMPLER_ALONE, _self_drafted_features(tuner, ids_1T, chunk, mask_1MD)


def _self_drafted_features(
    tuner: GatedLoraTuner, ids_1T: torch.LongTensor, chunk: BlockLayout, mask_1MD: torch.Tensor
) -> torch.Tensor:
    """`(1, M, D)`: the sampler head's features as in decoding: each sees the draft before it."""
    k = tuner.active_mtp_config.k
    mask_AKD = mask_1MD.view(-1, k, mask_1MD.shape[-1])
    next_A = ids_1T[0, chunk.stands_for_BM[0, ::k]]  # the base's own next token, before the first draft
    before_AK = torch.cat([next_A[:, None], tuner.draft(next_A, mask_AKD).token_BK[:, :-1]], dim=1)
    return tuner.sampler_head()(tuner.model.get_input_embeddings()(before_AK), mask_AKD).view(mask_1MD.shape)


def _ranks_by_block(
    tuner: GatedLoraTuner, chunk: BlockLayout, labels_1T: torch.LongTensor, hidden_1MD: torch.Tensor
) -> list[list[int]]:
    """The ranks of the true tokens, for each block in order. Positions beyond the answer have none."""
    column_M = chunk.target_columns(labels_1T)[0]
    has_token_M = column_M != IGNORE
    ranks = token_ranks(tuner.unembedding(), hidden_1MD[0, has_token_M], labels_1T[0, column_M[has_token_M]])
    counts = has_token_M.view(-1, tuner.active_mtp_config.k).sum(dim=1)
    return [block.tolist() for block in ranks.split(counts.tolist())]
