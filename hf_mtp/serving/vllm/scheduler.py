"""vLLM's scheduler, which also keeps room for masks: slots of the cache, and columns of the batch."""

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

from .arguments import OTHER_LORA

logger = init_logger(__name__)


class MaskScheduler(Scheduler):
    """The class that vLLM loads as `scheduler_cls`. Arguments as in vLLM's `Scheduler`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_lookahead_tokens = self.num_spec_tokens
        # vLLM has made sure that more than this is left: room for a token and the drafts of each request.
        self.max_num_scheduled_tokens -= self.num_spec_tokens * self.max_num_running_reqs
        if self.dynamic_sd_lookup is None:  # else vLLM pads requests with drafts that are no tokens
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        self.greedy_only = current_platform.is_cpu() and not verifies_samples()

    def schedule(self, *args, **kwargs) -> SchedulerOutput:
        """The next pass. Arguments and result are those of vLLM's own.

        Where the backend cannot verify drafts of requests that sample, nothing is drafted while there are any.
        """
        kinds = {request.sampling_params.sampling_type for request in self.requests.values()}
        plain = self.greedy_only and bool(kinds - {SamplingType.GREEDY})
        if plain:
            for request in self.running:
                request.spec_token_ids = []
        output = super().schedule(*args, **kwargs)
        if plain:
            output.num_spec_tokens_to_schedule = 0
        return output

    def add_request(self, request: Request) -> None:
        """Takes a request. One with a LoRA of its own ends with an error; an exception would end the engine.

        Args:
            request (`Request`): The request.
        """
        lora, request.lora_request = request.lora_request, None
        super().add_request(request)
        if lora is not None:
            logger.error("Request %s asks for the LoRA %r. %s", request.request_id, lora.lora_name, OTHER_LORA)
            self.grammar_compile_error_reqs.add(request.request_id)  # what ends after the next pass, with an error


def verifies_samples() -> bool:
    """Whether the CPU backend is known to give each draft the temperature of its request. That of 0.32 does not."""
    value_B, ends_B = torch.tensor([0.25, 0.5]), torch.tensor([1, 3], dtype=torch.int32)
    try:
        return expand_batch_to_tokens(value_B, ends_B, 3).tolist() == [0.25, 0.5, 0.5]
    except TypeError:  # the worker is another process, and has the function's code for CPUs
        return False
