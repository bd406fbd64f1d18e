"""The decode loop: draft, verify, accept, roll back.

One forward pass verifies the drafts of the pass before and computes masks for the next ones. Its regular tokens are
the pending token and its drafts (at first, the prompt); mask blocks follow them: after the last one in linear
decoding, after every one in quadratic decoding, so that there are drafts whatever is accepted. All masks and rejected
drafts stand at the end of the cache, and rolling back is one crop.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from .drafting import draft_greedily
from .layout import decoding_layout
from .statistics import MTPStatistics
from .verification import Transcript, verify_greedily

if TYPE_CHECKING:
    from .tuner import GatedLoraModel

Strategy = Literal["quadratic", "linear"]


@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(mtp=True, return_dict_in_generate=True)` returns.

    All fields of [`~transformers.generation.GenerateDecoderOnlyOutput`], and:

    Args:
        mtp_statistics ([`MTPStatistics`]): Counts of forward passes, drafts and accepted drafts.
    """

    mtp_statistics: MTPStatistics | None = None


def decode_greedily(
    model: "GatedLoraModel",
    input_ids: torch.LongTensor,
    k: int,
    strategy: Strategy,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
) -> tuple[Transcript, DynamicCache, MTPStatistics]:
    """Greedy speculative decoding of one sequence.

    Args:
        model ([`GatedLoraModel`]): The upgraded model.
        input_ids (`torch.LongTensor` of shape `(1, S)`): The prompt.
        k (`int`): Drafts per forward pass at most.
        strategy (`"quadratic"` or `"linear"`): Whether masks hang on every regular token or on the last one.
        logits_processor, stopping_criteria, generation_config, streamer: As prepared by `generate`.

    Returns:
        The transcript; the cache, which holds all tokens but the last; the counts.
    """
    wants = generation_config.return_dict_in_generate
    transcript = Transcript(
        input_ids,
        scores=() if wants and generation_config.output_scores else None,
        logits=() if wants and generation_config.output_logits else None,
    )
    statistics = MTPStatistics()
    # A cache that keeps every layer whole, also those with a sliding window: the masks limit what they see.
    cache = DynamicCache()
    draft_K = input_ids.new_empty(0)
    while not transcript.stopped:
        length = transcript.sequence.shape[1]
        past = cache.get_seq_length()
        room = generation_config.max_length - length  # tokens that may still be returned, at least 1

        # One pass over what the cache lacks, the drafts, and a block of masks on each token that may turn out last.
        draft_K = draft_K[: room - 1]
        regular_1T = torch.cat([transcript.sequence[:, past:], draft_K[None]], dim=1)
        anchors = 1 + len(draft_K) if strategy == "quadratic" else 1
        masks = min(k, room - 2, model.positions_left(past + regular_1T.shape[1]))
        layout = decoding_layout(regular_1T.shape[1], past, anchors, max(masks, 0), regular_1T.device)
        logits_RV, hidden_AKD = model.masked_step(regular_1T, layout, cache, logits_rows=1 + len(draft_K))

        accepted = verify_greedily(transcript, draft_K, logits_RV, logits_processor, stopping_criteria)

        new_tokens = transcript.sequence[0, length:]
        statistics.count_step(drafted=len(draft_K), accepted=accepted, tokens=len(new_tokens))
        if streamer is not None:
            streamer.put(new_tokens.cpu())

        # Keep the tokens before the pending one; masks and rejected drafts go.
        cache.crop(transcript.sequence.shape[1] - 1 - cache.get_seq_length())

        block = accepted - (1 + len(draft_K) - anchors)  # the block that hangs on the last accepted token, if any
        draft_K = draft_K[:0]
        if block >= 0 and not transcript.stopped:
            draft_K = draft_greedily(
                new_tokens[-1:],
                hidden_AKD[block],
                embedding=model.model.get_input_embeddings(),
                unembedding=model.model.get_output_embeddings(),
                sampler=model.sampler_head(),
            )
    if streamer is not None:
        streamer.end()
    return transcript, cache, statistics
