"""Runs one engine in a process of its own, because vLLM keeps state that is process-wide.

A task has `arguments` of vLLM's LLM, and `groups` of requests that are sent together. Optional are `adapter` (the
folder of an exported adapter), `strategy`, `k`, and `patches`: functions below that break or mend something.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample import rejection_sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from hf_mtp.decoding.schedule.costs import PassCosts
from hf_mtp.serving.vllm import guard
from hf_mtp.serving.vllm.arguments import engine_arguments
from hf_mtp.serving.vllm.runner import MaskRunner

SMALL = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 32 << 20,
    "block_size": 32,
    "seed": 0,
    "disable_log_stats": False,
}


def correct_temperatures():
    """What `expand_batch_to_tokens` says that it does. In vLLM 0.32 on a CPU it returns memory that nobody wrote."""

    def expand(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
        counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
        value = torch.where(x == replace_from, torch.as_tensor(replace_to, dtype=x.dtype), x)
        return value.repeat_interleave(counts, output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand


def newer_release():
    """Another release with the same methods."""
    vllm.__version__ = "0.33.1"


def other_method():
    """The same release with another method."""
    GPUModelRunner._preprocess = lambda self, scheduler_output, padded: None


def no_guard():
    """Starts with what the guard refuses."""
    guard.not_supported = lambda config: {}


def ten_columns_free():
    """Passes of up to ten columns cost the same, and each further column as much as a pass."""
    points = [(1, 1.0), (10, 1.0), (20, 11.0)]
    MaskRunner.measure_costs = lambda self: setattr(self.mask_schedule, "costs", PassCosts(points, points))


class Log:
    """What a runner computed in each pass: drafts and masks of its requests, tokens that came, and the next drafts."""

    def __init__(self, llm):
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.rows, self.passes = {}, []
        propose = runner.propose_draft_token_ids

        def logged(output, tokens, *args):
            drafts = propose(output, tokens, *args)
            self.passes.append([len(tokens), sum(runner.masks.values())])
            for req_id, new, found in zip(runner.input_batch.req_ids, tokens, drafts, strict=True):
                if new:
                    self.rows.setdefault(req_id, []).append([len(new), found])
            return drafts

        runner.propose_draft_token_ids = logged

    def take(self, request_id: str) -> list:
        names = [name for name in self.rows if name.split("-")[0] == request_id]
        return [row for name in names for row in self.rows.pop(name)]


def sampling(options: dict):
    regex = options.pop("regex", None)
    if regex:
        options["structured_outputs"] = StructuredOutputsParams(regex=regex)
    return SamplingParams(**{"temperature": 0, "max_tokens": 40, "ignore_eos": True, **options})


def answer(output, log) -> dict:
    completion = output.outputs[0]
    chosen = [
        step[token].logprob for step, token in zip(completion.logprobs or [], completion.token_ids, strict=False)
    ]
    return {
        "tokens": list(completion.token_ids),
        "text": completion.text,
        "reason": completion.finish_reason,
        "logprobs": chosen,
        "cached": output.num_cached_tokens,
        "passes": log.take(output.request_id) if log else None,
    }


def outcome(task: dict) -> dict:
    """What comes out of a task: for each group, what each request got; for each pass, its requests and masks."""
    for name in task.get("patches", ()):
        globals()[name]()
    arguments = {**SMALL, **task["arguments"]}
    if "adapter" in task:
        own = engine_arguments(task["adapter"], task.get("k"), task.get("strategy", "linear"))
        arguments = {**own, **arguments}
    start = time.perf_counter()
    llm = LLM(**arguments)
    result = {"seconds": time.perf_counter() - start, "groups": []}
    log = Log(llm) if "adapter" in task and arguments.get("tensor_parallel_size", 1) == 1 else None
    for group in task["groups"]:
        prompts = [{"prompt_token_ids": ids} for ids in group["prompts"]]
        options = group.get("options", {})
        options = options if isinstance(options, list) else [options] * len(prompts)
        lora = LoRARequest("own", 7, group["lora"]) if "lora" in group else None
        outputs = llm.generate(prompts, [sampling(dict(each)) for each in options], use_tqdm=False, lora_request=lora)
        result["groups"].append([answer(output, log) for output in outputs])
    result["metrics"] = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    result["passes"] = log.passes if log else None
    return result


def run(task: dict, output: Path) -> None:
    """Writes the outcome of a task as JSON, and what the engine says beside it."""
    said = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout = sys.stderr = os.fdopen(said, "w", buffering=1)  # pytest has put its own there
    try:
        output.write_text(json.dumps(outcome(task)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # the parent's own clean-up is not the child's
