"""One forward pass that verifies the last drafts and computes the next masks, as in hf_mtp's linear decoding.

The columns of a request are [pending token, drafts ..., masks ...]. vLLM's scheduler knows of the drafts only. The
runner appends the masks to a copy of the scheduler's output. vLLM's LoRA acts on their rows alone, their embeddings
are the adapter's, and they are left out of what is verified. Their keys and values lie behind what the scheduler
counts as computed, so the next pass overwrites them.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest

from ...decoding.schedule.costs import measure_costs
from .arguments import OTHER_LORA
from .schedule import MaskSchedule

LORA_ID = 1
PLAIN_COLUMNS, MASKED_COLUMNS = (4, 16, 64, 256), (9, 17, 65, 257)  # of the passes that are timed at the start
# On a CPU, vLLM gathers the LoRA's weights anew for each row: larger passes with masks take seconds, and never pay.
MOST_MASKED_ON_CPU = 65


class MaskRunner:
    """Mixed into the platform's Model Runner V1. Overrides what [`~hf_mtp.serving.vllm.guard.METHODS`] lists.

    Attributes:
        masks (`dict[str, int]`): The number of masks of each request in the running pass.
    """

    def prepare_masks(self) -> None:
        """Sets up what vLLM's own runner does not have."""
        self.masks: dict[str, int] = {}
        self.mask_schedule = MaskSchedule(self.drafter.k)
        self.mask_lora = LoRARequest("hf_mtp", LORA_ID, self.drafter.adapter.folder)
        self.enable_prompt_embeds = True  # of the runner alone: vLLM goes on refusing prompts that are embeddings

    def load_model(self, *args, **kwargs) -> None:
        """Loads the base, the adapter and its LoRA."""
        super().load_model(*args, **kwargs)
        super().add_lora(self.mask_lora)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Refuses other LoRAs.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"The LoRA {lora_request.lora_name!r} cannot be added: {OTHER_LORA}")

    # ---------------------------------------------------------------- masks behind the drafts

    def execute_model(self, scheduler_output, intermediate_tensors=None):
        """Runs a pass with masks. Arguments and result are those of vLLM's own."""
        result = super().execute_model(self._with_masks(scheduler_output), intermediate_tensors)
        state = self.execute_model_state
        if state is not None:  # grammars are applied to drafts, and know nothing of masks
            spec = scheduler_output.scheduled_spec_decode_tokens
            known = replace(state.scheduler_output, scheduled_spec_decode_tokens=spec)
            self.execute_model_state = state._replace(scheduler_output=known)
        return result

    def _with_masks(self, output):
        """A copy of the scheduler's output in which each request that reaches its end has masks."""
        scheduled, total = dict(output.num_scheduled_tokens), output.total_num_scheduled_tokens
        spec, self.masks = dict(output.scheduled_spec_decode_tokens), {}
        room = dict(self._room(output))
        requests, most = self.mask_schedule.plan(len(room))
        for req_id in list(room)[:requests]:
            masks = min(most, output.num_spec_tokens_to_schedule, room[req_id], self.max_num_tokens - total)
            if masks > 0:
                self.masks[req_id] = masks
                spec[req_id] = [*spec.get(req_id, ()), *[0] * masks]
                scheduled[req_id] += masks
                total += masks
        changed = {"num_scheduled_tokens": scheduled, "total_num_scheduled_tokens": total}
        return replace(output, scheduled_spec_decode_tokens=spec, **changed)

    def _room(self, output) -> Iterator[tuple[str, int]]:
        """Each request that reaches its end, and how many masks its cache has room for."""
        tables = self.input_batch.block_table.block_tables
        for req_id, known, computed, blocks in self._progress(output):
            end = computed + output.num_scheduled_tokens[req_id]
            if end - len(output.scheduled_spec_decode_tokens.get(req_id, ())) >= known:
                slots = min(count * table.block_size for count, table in zip(blocks, tables, strict=True))
                yield req_id, min(self.max_model_len, slots) - end

    def _progress(self, output) -> Iterator[tuple[str, int, int, list[int]]]:
        """For each scheduled request: its name, its known and its computed tokens, and its blocks in each cache."""
        for new in output.scheduled_new_reqs:
            yield new.req_id, len(new.prompt_token_ids), new.num_computed_tokens, [len(ids) for ids in new.block_ids]
        cached = output.scheduled_cached_reqs
        for index, req_id in enumerate(cached.req_ids):
            state, more = self.requests[req_id], cached.new_block_ids[index]
            blocks = [0] * len(more) if req_id in cached.resumed_req_ids else [len(ids) for ids in state.block_ids]
            blocks = [count + len(ids) for count, ids in zip(blocks, more, strict=True)] if more else blocks
            known = len(state.prompt_token_ids) + cached.num_output_tokens[index]
            yield req_id, known, cached.num_computed_tokens[index], blocks

    def _update_states(self, scheduler_output):
        result = super()._update_states(scheduler_output)
        for req_id, masks in self.masks.items():  # penalties and bad words are applied to drafts
            del self.input_batch.spec_token_ids[self.input_batch.req_id_to_index[req_id]][-masks:]
        return result

    def _masks_R(self) -> np.ndarray:
        return np.array([self.masks.get(req_id, 0) for req_id in self.input_batch.req_ids], dtype=np.int32)

    def _calc_spec_decode_metadata(self, num_draft_tokens, cu_num_scheduled_tokens):
        masks_R = self._masks_R()
        return super()._calc_spec_decode_metadata(num_draft_tokens - masks_R, cu_num_scheduled_tokens - masks_R)

    def _sample(self, logits, spec_decode_metadata):
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None  # 0.32 on a CPU: top-k of no draft at all raises in the rejection sampler
        return super()._sample(logits, spec_decode_metadata)

    # ---------------------------------------------------------------- the gate, and what masks are embedded as

    def set_active_loras(self, input_batch, num_scheduled_tokens, num_sampled_tokens=None, *args, **kwargs) -> None:
        """Gives the LoRA to the masks alone. Arguments are those of vLLM's own."""
        masks_R, ends_R = self._masks_R(), np.cumsum(num_scheduled_tokens)
        spans = [np.arange(end - count, end) for end, count in zip(ends_R, masks_R, strict=True)]
        row_M = np.concatenate(spans)
        lora_N = np.zeros(int(ends_R[-1]), dtype=np.int64)
        lora_N[row_M] = LORA_ID
        self.mask_row_M = torch.from_numpy(row_M).to(self.device)
        self.mask_step_M = torch.from_numpy(np.concatenate([np.arange(len(span)) for span in spans])).to(self.device)
        prompt = (0,) * int((num_sampled_tokens - masks_R).sum())
        # On a CPU, prefill mode takes no more segments than requests, and skips LoRA if no row has one. Other devices
        # do not read it.
        mapping = LoRAMapping(tuple(lora_N.tolist()), prompt, is_prefill=not len(row_M))
        self.lora_manager.set_active_adapters({self.mask_lora}, mapping)

    def _determine_batch_execution_and_padding(self, *args, **kwargs):
        # Requests carry no LoRA of their own, so a CUDA graph that was captured without LoRA would be replayed.
        if self.masks:
            kwargs |= {"force_has_lora": True, "force_num_active_loras": self.lora_config.max_loras}
        return super()._determine_batch_execution_and_padding(*args, **kwargs)

    def _preprocess(self, *args, **kwargs):
        input_ids, inputs_embeds, *rest = super()._preprocess(*args, **kwargs)
        inputs_embeds[self.mask_row_M] = self.drafter.mask_kE[self.mask_step_M]
        return input_ids, inputs_embeds, *rest

    # ---------------------------------------------------------------- drafts

    def propose_draft_token_ids(
        self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states, *args, **kwargs
    ) -> list[list[int]]:
        """The next drafts of each request: those of its masks, if all drafts before them were accepted."""
        drafts, ready, end = [[] for _ in sampled_token_ids], {}, 0
        for row, (req_id, tokens) in enumerate(zip(self.input_batch.req_ids, sampled_token_ids, strict=True)):
            end += scheduler_output.num_scheduled_tokens[req_id]
            offered = len(scheduler_output.scheduled_spec_decode_tokens.get(req_id, ()))
            masks = self.masks.get(req_id, 0)
            if tokens:
                self.mask_schedule.observe(offered, len(tokens) - 1)
            if masks and len(tokens) == offered + 1:
                ready.setdefault(masks, []).append((row, tokens[-1], end))
        for masks, rows in ready.items():  # nearly always all have k
            row_B, pending_B, end_B = (torch.tensor(values, device=self.device) for values in zip(*rows, strict=True))
            column_BK = end_B[:, None] + torch.arange(-masks, 0, device=self.device)
            found = self.drafter.draft(pending_B, hidden_states[column_BK]).tolist()
            for row, tokens in zip(row_B.tolist(), found, strict=True):
                drafts[row] = tokens
        return drafts

    def _input_fits_in_drafter(self, common_attn_metadata):
        return True

    # ---------------------------------------------------------------- costs

    @torch.inference_mode()
    def measure_costs(self) -> None:
        """Times passes of several sizes, attention left out. All ranks take the times of the first one."""
        most = self.max_num_tokens
        most_masked = min(most, MOST_MASKED_ON_CPU) if self.device.type == "cpu" else most
        limits = ((PLAIN_COLUMNS, most), (MASKED_COLUMNS, most_masked))
        sizes = [sorted({min(n, limit) for n in columns}) for columns, limit in limits]
        self.mask_schedule.costs = measure_costs(self._run_columns, *sizes, get_tp_group().broadcast_object)

    def _run_columns(self, columns: int, masks: bool) -> None:
        k = self.drafter.k
        requests = columns // (1 + 2 * k) or 1
        count = min(requests * k, columns - 1) if masks else 0
        lora = (0,) * (columns - count) + (LORA_ID,) * count
        mapping = LoRAMapping(lora, (0,) * (columns - count), is_prefill=not masks)
        self.lora_manager.set_active_adapters({self.mask_lora}, mapping)
        inputs = {"positions": self.positions[:columns], "inputs_embeds": self.inputs_embeds.gpu[:columns]}
        with set_forward_context(None, self.vllm_config, num_tokens=columns):
            hidden_ND = self.model(input_ids=None, **inputs)
        self.model.compute_logits(hidden_ND[: columns - count])
        if masks:
            pending_B = torch.zeros(requests, dtype=torch.long, device=self.device)
            self.drafter.draft(pending_B, hidden_ND[None, :k].expand(requests, -1, -1))
        self._sync_device()
