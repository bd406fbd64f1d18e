"""One call of `generate(mtp=True)`: from the arguments that transformers prepared to the output that it returns."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.generation.streamers import BaseStreamer

from ..adapter.tuner import GatedLoraTuner
from ..base.caches import cache_name, copied, replace_contents
from ..base.distributed import agreed_seconds, any_process_unfinished, is_sharded
from ..base.rope import rope_switches, scaled_columns
from ..cache.protocol import DecodingCache
from ..cache.rollback import RollbackCache
from ..passes.bitwise_check import refuse_unless_bitwise
from ..passes.speculation_mode import PASSES, SpeculationMode
from .batch import Batch
from .checks import (
    refuse_bitwise,
    refuse_cache,
    refuse_checkpointing,
    refuse_dropped_cache,
    refuse_for_sequences,
    refuse_generation_mode,
    refuse_ids,
    refuse_rope_switches,
)
from .drafters.acceptance import SIBLINGS
from .drafters.masks import MaskDrafter
from .loop import DecodingLoop
from .noise import PositionNoise, draw_seed
from .prefill import read_in_chunks, read_texts
from .processors import most_new_tokens, processors_of_row
from .prompt import Prompt
from .schedule.adaptive import AdaptiveSchedule
from .schedule.base import Schedule
from .schedule.fixed import FixedSchedule
from .sequence import Sequence, padded_ids, stacked_records
from .states import attentions_as_shown, prepend_states, restore_padding
from .statistics import MTPGenerateOutput, MTPStatistics
from .streaming import RowStream
from .verifier import Verifier

COLUMNS_STEP = 256


@dataclass(frozen=True)
class GenerateCall:
    """The decode loop that `generate` calls as its `custom_generate`.

    Args:
        tuner ([`GatedLoraModel`]): The upgraded model.
        mode ([`SpeculationMode`]): How it computes several tokens per pass.
        strategy (`str`): `"auto"`, `"quadratic"` or `"linear"`.
        k (`int`): Masks per block.
        generator (`torch.Generator`, *optional*), streamer
            ([`~transformers.generation.streamers.BaseStreamer`], *optional*), synced_gpus (`bool`, *optional*): As
            passed to `generate`, which does not pass them on to a custom decode loop.
        bitwise (`bool`, *optional*, defaults to `False`): Whether regular tokens are computed bit for bit as in plain
            decoding.
    """

    tuner: GatedLoraTuner
    mode: SpeculationMode
    strategy: str
    k: int
    generator: torch.Generator | None
    streamer: BaseStreamer | None
    synced_gpus: bool | None
    bitwise: bool = False

    def __call__(
        self,
        model,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> torch.LongTensor | MTPGenerateOutput:
        """Decodes a batch. Arguments are those that transformers passes to a decode loop."""
        refuse_generation_mode(generation_config)
        refuse_ids(input_ids, self.tuner.vocab_size)
        refuse_checkpointing(self.tuner.model, self.mode)
        given = model_kwargs.get(cache_name(model_kwargs))
        is_users = getattr(given, "_is_user_defined", False)
        if is_users:  # so that an error cannot leave it half written
            model_kwargs = {**model_kwargs, cache_name(model_kwargs): copied(given)}
        prompt = Prompt.of(self.tuner.model, input_ids, model_kwargs, getattr(generation_config, "_mask_length", None))
        new_tokens = most_new_tokens(stopping_criteria, input_ids.shape[1])
        columns = prompt.columns + new_tokens - 1
        pad_token = getattr(generation_config, "_pad_token_tensor", None)
        pad_token = 0 if pad_token is None else int(pad_token)
        is_alike = not self._changes_rope(columns) and not self._changes_scale(prompt.columns, columns)
        in_step = len(input_ids) > 1 and not is_alike
        verifier = Verifier(logits_processor, stopping_criteria, len(input_ids), pad_token, in_step)
        refuse_dropped_cache(self.tuner.model, prompt, input_ids.shape[1] + new_tokens - 1, columns)
        self._refuse(prompt, columns, generation_config, verifier)
        sequences = self._sequences(input_ids, prompt, new_tokens, generation_config, logits_processor)
        stream, statistics = RowStream(self.streamer, sequences, pad_token), MTPStatistics()
        keeps_cache = is_users or bool(generation_config.return_dict_in_generate)
        for part in prompt.parts(together=self.mode is SpeculationMode.TREE):
            rows, cache = [sequences[row] for row in part.rows], self._cache(part, columns, generation_config)
            batch = Batch(rows, cache, self._read_in_chunks(part, cache, columns, generation_config))
            self._decode(batch, verifier, stream, statistics, generation_config, keeps_cache)
        for row in sequences:
            prepend_states(row, prompt.extra.states, row.row)
            if part is not prompt:
                restore_padding(row)
        ids = padded_ids(sequences, pad_token)
        if keeps_cache and part is prompt:
            self._forward(generation_config).catch_up(cache, ids)
            held = cache.give_back(prompt.cache)
        elif keeps_cache:  # rows were decoded one after the other
            held = read_texts(self.tuner.model, ids[:, :-1], input_ids.shape[1], model_kwargs)
        if is_users:
            replace_contents(given, held)
        self.tuner.mtp_statistics = statistics
        stream.end()
        if not generation_config.return_dict_in_generate:
            return ids
        return _output(ids, sequences, given if is_users else held, statistics)

    def _refuse(self, prompt: Prompt, columns: int, config: GenerationConfig, verifier: Verifier) -> None:
        refuse_cache(prompt.cache, columns)
        if _is_static(config):
            refuse_rope_switches(self.tuner.model.config, columns)
        if self.mode is not SpeculationMode.TREE:
            refuse_for_sequences(
                prompt,
                is_static=_is_static(config),
                synced_gpus=self.synced_gpus,
                recomputes=self.mode is SpeculationMode.RECOMPUTE,
                in_step=verifier.keeps_rows_in_step,
                changes_rope=self._changes_rope(columns),
            )
        if self.bitwise:
            is_tree = self.mode is SpeculationMode.TREE
            in_chunks = config.prefill_chunk_size is not None
            refuse_bitwise(self.tuner.model, prompt, columns, is_tree, in_chunks)
            refuse_unless_bitwise(self.tuner, len(prompt.rows))

    def _changes_rope(self, columns: int) -> bool:
        return any(columns >= length for length in rope_switches(self.tuner.model.config))

    def _changes_scale(self, first: int, last: int) -> bool:
        step = scaled_columns(self.tuner.model.config)
        return step is not None and first // step < last // step

    def _sequences(
        self,
        input_ids: torch.LongTensor,
        prompt: Prompt,
        new_tokens: int,
        config: GenerationConfig,
        processors: LogitsProcessorList,
    ) -> list[Sequence]:
        batch, vocab, padding = len(input_ids), self.tuner.vocab_size, prompt.start_B.tolist()
        seed = draw_seed(self.generator) if config.do_sample else None
        return [
            Sequence(
                input_ids[row],
                row,
                min(padding[row], input_ids.shape[1]),
                new_tokens,
                config,
                processors_of_row(processors, row, batch),
                None if seed is None else PositionNoise(seed, row, vocab, input_ids.device),
            )
            for row in range(batch)
        ]

    def _decode(
        self,
        batch: Batch,
        verifier: Verifier,
        stream: RowStream,
        statistics: MTPStatistics,
        config: GenerationConfig,
        keeps_cache: bool,
    ) -> None:
        """Decodes rows together until these rows, and those of other processes, are finished."""
        is_static = _is_static(config)
        rows, device = len(batch.sequences), str(self.tuner.model.device)
        key = self.tuner.active_adapters[0], self.k, rows, is_static, device, self.bitwise
        schedule = self._schedule(key, is_static)
        siblings = SIBLINGS if isinstance(schedule, AdaptiveSchedule) else 0
        drafters = [MaskDrafter(self.tuner, schedule.mask_acceptance, verifier.processors, siblings)]
        if isinstance(schedule, AdaptiveSchedule) and not is_static:  # fixed shapes have no room for these
            drafters += schedule.lookups(self.tuner.active_mtp_config.ngrams, self.tuner.vocab_size)
        loop = DecodingLoop(
            self._forward(config), schedule, drafters, verifier, self.k, fixed_shape=is_static, statistics=statistics
        )
        others_unfinished = any_process_unfinished(self.tuner.model, self.synced_gpus)
        keeps_rows = keeps_cache or is_static or verifier.keeps_rows_in_step or self.bitwise
        try:
            loop.step(batch)
            stream.send(batch, statistics.forward_passes)
            if isinstance(schedule, AdaptiveSchedule) and schedule.costs is None and not is_sharded(self.tuner.model):
                loop.measure_costs(batch, agreed_seconds(self.tuner.model))
            while others_unfinished(batch.is_done):
                if not keeps_rows:
                    batch.retire()
                loop.step(batch)
                stream.send(batch, statistics.forward_passes)
        finally:  # an interrupted call, too, leaves the costs that it measured
            if isinstance(schedule, AdaptiveSchedule):
                self.tuner.schedules.give_back(key, schedule)

    def _read_in_chunks(
        self, prompt: Prompt, cache: DecodingCache, columns: int, config: GenerationConfig
    ) -> torch.Tensor:
        """Reads all of a prompt but its last chunk, and returns that one."""
        # A model whose rotary embeddings change reads the whole text at once, as it does where they change.
        is_whole = self.mode is SpeculationMode.RECOMPUTE or self._changes_rope(columns)
        chunk = None if is_whole else config.prefill_chunk_size
        return read_in_chunks(self._forward(config), prompt.unread_BT, cache, chunk)

    def _schedule(self, key: tuple, is_static: bool) -> Schedule:
        if self.strategy != "auto":
            return FixedSchedule(self.k, linear=self.strategy == "linear")
        budget = 2 * self.k if is_static else None
        return self.tuner.schedules.borrow(key, lambda: AdaptiveSchedule(self.k, budget))

    def _forward(self, config: GenerationConfig):
        returns = config.return_dict_in_generate
        return PASSES[self.mode][0](
            self.tuner,
            output_hidden_states=bool(returns and config.output_hidden_states),
            output_attentions=bool(returns and config.output_attentions),
            compiled=self._compiled_forward(config) if _is_static(config) else None,
            bitwise=self.bitwise,
        )

    def _cache(self, prompt: Prompt, columns: int, config: GenerationConfig) -> DecodingCache:
        """The cache in which some rows are decoded. It starts with the tokens of the given one."""
        kind = PASSES[self.mode][1]
        if kind is not RollbackCache:
            cache = kind(prompt.start_B, held=prompt.cache)
        else:
            cache = RollbackCache(
                prompt.start_B,
                columns=_fixed_columns(columns, self.k, config) if _is_static(config) else None,
                offloading=config.cache_implementation == "offloaded" and torch.cuda.is_available(),
            )
        prompt.fill(cache)
        return cache

    def _compiled_forward(self, config: GenerationConfig) -> Callable | None:
        """The base's compiled forward pass, if `generate` itself would compile it."""
        model = self.tuner.model
        if config.disable_compile or (model.device.type == "cpu" and config.compile_config is None):
            return None
        return model.get_compiled_call(config.compile_config)


def _output(
    ids: torch.LongTensor, sequences: list[Sequence], cache: Cache | None, statistics: MTPStatistics
) -> MTPGenerateOutput:
    return MTPGenerateOutput(
        sequences=ids,
        scores=stacked_records(sequences, "score"),
        logits=stacked_records(sequences, "logits"),
        hidden_states=stacked_records(sequences, "hidden_states"),
        attentions=attentions_as_shown(stacked_records(sequences, "attentions"), cache),
        mtp_statistics=statistics,
        **{cache_name(MTPGenerateOutput.__dataclass_fields__): cache},
    )


def _is_static(config: GenerationConfig) -> bool:
    return config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS


def _fixed_columns(tokens: int, k: int, config: GenerationConfig) -> int:
    """Columns of a cache of fixed size, with room for the longest output and one more pass.

    The size is rounded up, so that outputs of similar length share one compiled graph.
    """
    columns = max(tokens, getattr(config, "max_cache_len", None) or 0) + (k + 1) ** 2 + k
    return -(-columns // COLUMNS_STEP) * COLUMNS_STEP
