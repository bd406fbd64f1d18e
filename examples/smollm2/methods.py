"""Decoding methods for SmolLM2: ours, and those of transformers.

Knows models and arguments of `generate`. Knows nothing of prompts, files or tables.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_mtp import GatedLoraConfig
from hf_mtp.base.padding import up_to_end
from hf_mtp.decoding.schedule.adaptive import AdaptiveSchedule
from hf_mtp.decoding.schedule.costs import PassCosts
from hf_mtp.decoding.schedule.store import ScheduleStore
from hf_mtp.evaluation.compare import same_weights
from hf_mtp.evaluation.decoded import timed_generate

# 10 million parameters; the smallest SmolLM2 is the base itself.
SMALL_DRAFT = Path(__file__).resolve().parents[1] / "quickstart" / "base"
# What passes cost where a pass over 81 columns takes little longer than one over a single column, as on a GPU.
NEARLY_FREE = PassCosts([(1, 1.0), (81, 1.25)], [(2, 1.05), (81, 1.3)])


@dataclass(frozen=True)
class Method:
    """One decoding method.

    Args:
        model (`str`): Which of [`Models`] decodes: the name of one of its attributes.
        options (`dict`): Arguments of `generate`.
        assistant_tokens (`int`, *optional*): Drafts per pass of assisted generation.
        has_small_draft (`bool`): Whether the small model of the quickstart drafts.
        is_rare (`bool`): Whether it decodes the first prompts only.
        copies (`int`): Rows of a batch, each with the same prompt.
    """

    model: str = "base"
    options: dict = field(default_factory=dict)
    assistant_tokens: int | None = None
    has_small_draft: bool = False
    is_rare: bool = False
    copies: int = 1

    @property
    def is_greedy(self) -> bool:
        return not self.options.get("do_sample")


def mtp(
    strategy: str = "auto", k: int | None = None, model: str = "adapter", is_rare: bool = False, **options
) -> Method:
    """A method with `mtp=True`."""
    options |= {"mtp": True, "mtp_strategy": strategy} | ({} if k is None else {"mtp_k": k})
    return Method(model, options, is_rare=is_rare)


def sampled(strategy: str, temperature: float, model: str = "adapter") -> Method:
    """A method that samples from the whole vocabulary."""
    return mtp(strategy, model=model, do_sample=True, temperature=temperature, top_k=0)


PLAIN = Method()
PLAIN_IN_A_BATCH = Method(copies=4, is_rare=True)  # does its text stay the same in half precision?
PEERS = {
    "prompt lookup": {
        f"{tokens} tokens, n-grams up to {size}": Method(
            options={"prompt_lookup_num_tokens": tokens, "max_matching_ngram_size": size}
        )
        for size in (2, 3)
        for tokens in (3, 5, 8, 10)
    },
    "early exit": {
        f"layer {layer}, {tokens} tokens": Method(
            options={"assistant_early_exit": layer}, assistant_tokens=tokens, is_rare=True
        )
        for layer, tokens in ((10, 2), (26, 2))
    },
    "small draft": {
        f"{tokens} tokens": Method(assistant_tokens=tokens, has_small_draft=True, is_rare=True)
        for tokens in (3, 6, 20)
    },
}


class FixedCosts(ScheduleStore):
    """Adaptive schedules that do not measure what passes cost.

    Args:
        costs ([`PassCosts`]): What they assume.
    """

    def __init__(self, costs: PassCosts):
        super().__init__()
        self.assumed = costs

    def borrow(self, key: Hashable, make: Callable[[], AdaptiveSchedule]) -> AdaptiveSchedule:
        schedule = super().borrow(key, make)
        schedule.costs = self.assumed
        return schedule


class Models:
    """The base, and what decodes with its weights, each loaded when it is first needed.

    Args:
        base (`str`): Folder of the base.
        adapter (`Path`): Folder of the adapter.
        dtype (`str`): Name of the dtype to compute in, or `"auto"` for the one that the base is stored in.
    """

    def __init__(self, base: str, adapter: Path, dtype: str = "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.base = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device).eval()
        self.adapter_folder = adapter

    def with_adapter(self, folder: Path) -> PeftModel:
        """The base with the adapter of a folder."""
        return PeftModel.from_pretrained(same_weights(self.base), folder).eval()

    @cached_property
    def adapter(self) -> PeftModel:
        """The base with the adapter."""
        return self.with_adapter(self.adapter_folder)

    @cached_property
    def without_table(self) -> PeftModel:
        """The base with the adapter, but without its n-gram table."""
        model = self.with_adapter(self.adapter_folder)
        model.active_peft_config.ngrams = None
        return model

    @cached_property
    def free_columns(self) -> PeftModel:
        """The base with the adapter. `auto` chooses columns as if they were nearly free."""
        model = self.with_adapter(self.adapter_folder)
        model.base_model.schedules = FixedCosts(NEARLY_FREE)
        return model

    @cached_property
    def untrained(self) -> PeftModel:
        """The base with a new adapter of the same sizes."""
        return self._with_new_adapter()

    def _with_new_adapter(self) -> PeftModel:
        config = self.adapter.active_peft_config
        fresh = GatedLoraConfig(k=config.k, r=config.r, lora_alpha=config.lora_alpha)
        return get_peft_model(same_weights(self.base), fresh).eval()

    @cached_property
    def table_alone(self) -> PeftModel:
        """The base with a new adapter, whose masks bring nothing, and the trained adapter's n-gram table."""
        model = self._with_new_adapter()
        model.active_peft_config.ngrams = self.adapter.active_peft_config.ngrams
        return model

    @cached_property
    def small_draft(self) -> PreTrainedModel:
        """A small model with a tokenizer of its own, in float32, in which it is fastest."""
        return AutoModelForCausalLM.from_pretrained(SMALL_DRAFT, dtype=torch.float32).to(self.base.device).eval()

    @cached_property
    def small_draft_options(self) -> dict:
        """What `generate` needs to let it draft."""
        own = AutoTokenizer.from_pretrained(SMALL_DRAFT, clean_up_tokenization_spaces=False)
        return {"assistant_model": self.small_draft, "tokenizer": self.tokenizer, "assistant_tokenizer": own}

    def decode(self, method: Method, inputs: dict, max_new_tokens: int) -> tuple[list[list[int]], int, float]:
        """The new tokens of each row up to its end, the number of forward passes, and the seconds."""
        model, options = getattr(self, method.model), method.options
        inputs = {name: value.repeat(method.copies, 1) for name, value in inputs.items()}
        if method.has_small_draft:
            options = options | self.small_draft_options
            self.small_draft.generation_config.num_assistant_tokens = method.assistant_tokens
        elif method.assistant_tokens:
            model.generation_config.num_assistant_tokens = method.assistant_tokens
        new_BN, passes, seconds = timed_generate(
            model, **inputs, max_new_tokens=max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **options
        )
        rows, ends = new_BN.tolist()[: len(new_BN) // method.copies], {self.tokenizer.eos_token_id}
        return [up_to_end(ids, ends) for ids in rows], passes, seconds
