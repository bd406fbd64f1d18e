"""One call of `generate(mtp=True)`: from what transformers prepared to what it returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.generation.streamers import BaseStreamer

from ..base.cache import RollbackCache, cache_name
from ..base.peers import agreed_seconds, peers_unfinished
from .drafting import Draw
from .loop import Task, decode
from .reading import Reading
from .request import (
    Prompt,
    refuse_for_sequences,
    refuse_generation_config,
    refuse_ids,
    refuse_rope_switches,
    refuse_short_cache,
)
from .sequence import SequenceCache, SequenceStep, WholeTextCache, WholeTextStep
from .statistics import MTPGenerateOutput, MTPStatistics
from .step import MaskedStep
from .transcript import Transcript
from .verification import WARPERS

if TYPE_CHECKING:
    from ..tuner import GatedLoraModel

COLUMNS_STEP = 256
# Other readings share the step of branches and a cache that rolls back.
STEPS = {Reading.SEQUENCES_FROM_STATES: SequenceStep, Reading.WHOLE_TEXTS: WholeTextStep}
CACHES = {Reading.SEQUENCES_FROM_STATES: SequenceCache, Reading.WHOLE_TEXTS: WholeTextCache}


@dataclass(frozen=True)
class GenerateCall:
    """The decode loop that `generate` calls as its `custom_generate`.

    Args:
        tuner ([`GatedLoraModel`]): The upgraded model.
        reading ([`Reading`]): How it reads several tokens per pass.
        strategy (`str`): `"auto"`, `"quadratic"` or `"linear"`.
        k (`int`): Drafts per pass that masks give at most.
        generator (`torch.Generator`, *optional*), streamer
            ([`~transformers.generation.streamers.BaseStreamer`], *optional*), synced_gpus (`bool`, *optional*): As
            passed to `generate`, which does not hand them on to a custom decode loop.
    """

    tuner: "GatedLoraModel"
    reading: Reading
    strategy: str
    k: int
    generator: torch.Generator | None
    streamer: BaseStreamer | None
    synced_gpus: bool | None

    def __call__(
        self,
        model,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> torch.LongTensor | MTPGenerateOutput:
        """Decodes a batch. Arguments are those of a decode loop of transformers."""
        refuse_generation_config(generation_config)
        refuse_ids(input_ids, self.tuner.vocab_size)
        prompt = Prompt.of(self.tuner.model, input_ids, model_kwargs)
        room = generation_config.max_length - input_ids.shape[1]
        columns = prompt.columns + room - 1
        refuse_short_cache(prompt.cache, columns)
        is_static = generation_config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS
        if is_static:
            refuse_rope_switches(self.tuner.model.config, columns)
        if self.reading is not Reading.BRANCHES:
            refuse_for_sequences(prompt, is_static, self.synced_gpus, whole=self.reading is Reading.WHOLE_TEXTS)

        returns = generation_config.return_dict_in_generate
        returns_cache = returns or getattr(prompt.cache, "_is_user_defined", False)
        task = Task(
            k=self.k,
            processors=logits_processor,
            criteria=stopping_criteria,
            streamer=self.streamer,
            draw=self._draw(logits_processor) if generation_config.do_sample else None,
            keep_rows=returns_cache or is_static,
            fixed_shape=is_static,
            others_unfinished=peers_unfinished(self.tuner.model, self.synced_gpus),
            agreed_seconds=agreed_seconds(self.tuner.model),
        )
        step = STEPS.get(self.reading, MaskedStep)(
            self.tuner,
            output_hidden_states=bool(returns and generation_config.output_hidden_states),
            output_attentions=bool(returns and generation_config.output_attentions),
            compiled=self._compiled_forward(generation_config) if is_static else None,
        )
        transcript, statistics = Transcript(input_ids, room, generation_config), MTPStatistics()
        for part in prompt.parts(together=self.reading is Reading.BRANCHES):
            cache = self._cache(part, columns, generation_config)
            pace = self.tuner.pace(self.strategy, len(part.rows), self.k, is_static)
            decode(step, task, part, transcript, cache, pace, statistics)
            if returns_cache and part.cache is not None:
                step.catch_up(cache)
                cache.hand_over(part.cache)
        self.tuner.mtp_statistics = statistics
        if self.streamer is not None:
            self.streamer.end()
        if not returns:
            return transcript.sequences
        return MTPGenerateOutput(
            sequences=transcript.sequences,
            scores=transcript.stacked("score"),
            logits=transcript.stacked("logits"),
            hidden_states=transcript.stacked("hidden_states"),
            attentions=transcript.stacked("attentions"),
            mtp_statistics=statistics,
            **{cache_name(MTPGenerateOutput.__dataclass_fields__): part.cache if part is prompt else None},
        )

    def _draw(self, processors: LogitsProcessorList) -> Draw:
        return Draw(LogitsProcessorList(p for p in processors if type(p) in WARPERS), self.generator)

    def _cache(self, prompt: Prompt, columns: int, config: GenerationConfig) -> RollbackCache | SequenceCache:
        """An own cache for some rows, which starts with what the given one holds."""
        if self.reading in CACHES:
            cache = CACHES[self.reading](prompt.start_B, held=prompt.cache)
        else:
            is_static = config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS
            cache = RollbackCache(
                prompt.start_B,
                columns=_fixed_columns(columns, self.k, config) if is_static else None,
                offloading=config.cache_implementation == "offloaded" and torch.cuda.is_available(),
            )
        cache.rows.set_ahead(prompt.ahead_B)
        if prompt.read:
            cache.take_over(prompt.cache)
        if prompt.beside.layers:  # refused for all other kinds of caches
            cache.see(prompt.cache, prompt.beside.layers, prompt.beside.inputs)
        return cache

    def _compiled_forward(self, config: GenerationConfig) -> Callable | None:
        """The base's compiled forward pass, under the conditions under which `generate` itself would compile it."""
        model = self.tuner.model
        if config.disable_compile or (model.device.type == "cpu" and config.compile_config is None):
            return None
        return model.get_compiled_call(config.compile_config)


def _fixed_columns(tokens: int, k: int, config: GenerationConfig) -> int:
    """Columns of a cache of fixed size: room for the longest output and one more pass.

    Rounded up, so that outputs of about the same length share one compiled graph.
    """
    columns = max(tokens, getattr(config, "max_cache_len", None) or 0) + (k + 1) ** 2 + k
    return -(-columns // COLUMNS_STEP) * COLUMNS_STEP
