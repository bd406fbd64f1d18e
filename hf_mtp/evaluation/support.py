"""Checks whether multi-token prediction supports a model, by decoding with a tiny random model of the same type."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..adapter.config import GatedLoraConfig
from ..base.randomness import own_randomness
from ..base.sizes import WINDOW
from ..base.tiny import tiny_model
from ..decoding.drafters.base import Drafts
from ..passes.speculation_mode import SpeculationMode, speculation_mode
from ..pretrained import is_adapter

EXACT = "exact"
PROMPTS = (WINDOW + 5, WINDOW - 3, WINDOW + 2)  # lengths in tokens; the first exceeds any sliding window
NEW_TOKENS, K = 24, 3


@dataclass
class SupportReport:
    """The result of [`check_support`].

    Args:
        model_type (`str`): The model type, as in the config.
        mode (`str`, *optional*): The speculation mode that the model allows: `"tree"`, `"chain"`, `"chain on a copied
            state"`, `"recomputed chain"` or `"none"`. `None` if it cannot be upgraded at all.
        reason (`str`, *optional*): Why it cannot be upgraded, or why no tiny model could be built.
        checks (`dict[str, str]`): For each check, `"exact"` or a description of the difference or error.
    """

    model_type: str
    mode: str | None = None
    reason: str | None = None
    checks: dict[str, str] = field(default_factory=dict)

    @property
    def strategy(self) -> str | None:
        """The most that it supports: `"quadratic"`, `"linear"` or `"plain"`; `None` if it cannot be upgraded."""
        if self.mode is None:
            return None
        mode = SpeculationMode(self.mode)
        return "quadratic" if mode is SpeculationMode.TREE else "linear" if mode.pays else "plain"

    @property
    def is_exact(self) -> bool:
        """Whether every supported check gave the output of plain decoding."""
        return all(result == EXACT or result.startswith("refused") for result in self.checks.values())

    def __str__(self) -> str:
        lines = [f"{self.model_type}: {self.strategy or 'not supported'} (mode: {self.mode or 'none'})"]
        if self.reason:
            lines.append(f"  {self.reason}")
        return "\n".join([*lines, *(f"  {name}: {result}" for name, result in self.checks.items())])


def check_support(model_or_config_or_id: PreTrainedModel | PreTrainedConfig | str) -> SupportReport:
    """Compares decoding with `mtp=True` to plain decoding, on a tiny random model of the same type, in float64.

    The checks cover all strategies, a batch of prompts, a static cache, and eager attention in addition to the model's
    default. Flex attention takes long to compile and flash attention needs a GPU, so both are skipped.

    Only the config of a Hub id is downloaded. Adapter weights are random. Drafts are partly right and partly wrong, so
    that acceptance and roll-back are tested, too.

    Args:
        model_or_config_or_id ([`~transformers.PreTrainedModel`], [`~transformers.PreTrainedConfig`] or `str`):
            The model to upgrade, its config, or its Hub id or folder. An adapter stands for its base.

    Returns:
        [`SupportReport`], which can be printed.

    Raises:
        TypeError: The argument is none of these.
        OSError: There is no such Hub id or folder, or you have no access to it.
    """
    config = _config_of(model_or_config_or_id)
    report = SupportReport(config.model_type)
    try:
        base = tiny_model(config)
        prompts = [_prompt(length, seed) for seed, length in enumerate(PROMPTS)]
        truths = [_generate(base, prompt) for prompt in prompts]
    except Exception as error:  # a config may lead to any error of its model's code
        report.reason = _first_line(error)
        return report
    try:
        with own_randomness(seed=0):
            model = _randomised(get_peft_model(base, GatedLoraConfig(k=K, r=4, lora_alpha=8))).eval()
    except (NotImplementedError, TypeError, ValueError) as error:
        report.reason = _first_line(error)
        return report
    tuner = model.base_model
    tuner.draft = Rehearsal(truths, tuner.draft)  # only on this model
    report.mode = speculation_mode(tuner.model).value
    for strategy in ("quadratic", "linear", "auto"):
        report.checks[strategy] = _result(model, prompts[:1], truths[:1], mtp_strategy=strategy)
    # Plain decoding is the base's own. The base may compute a padded row differently from the row alone.
    report.checks["batch"] = _result(model, prompts, None if report.strategy == "plain" else truths)
    report.checks["static cache"] = _result(model, prompts[:1], None, cache_implementation="static")
    base.set_attn_implementation("eager")
    report.checks["eager attention"] = _result(model, prompts[:1], None)
    return report


class Rehearsal:
    """Replaces an adapter's drafts by the tokens of a known output, with a wrong one in three of four calls.

    Args:
        sequences (`list[torch.LongTensor]`): The outputs, `(1, S)` each.
        own (`Callable`, *optional*): The adapter's own drafting. It is called too, so that its errors are found.
    """

    def __init__(self, sequences: list[torch.LongTensor], own: Callable | None = None):
        self.own = own
        self.next: dict[int, int] = {}
        for sequence in sequences:
            self.next.update(pairwise(sequence[0].tolist()))
        self.calls = 0

    def __call__(self, pending_B: torch.LongTensor, hidden_BKD: torch.Tensor, *args, **kwargs) -> Drafts:
        self.calls += 1
        if self.own is not None:
            self.own(pending_B, hidden_BKD, *args, **kwargs)
        rows, wrong = [], self.calls % 4  # the place of the wrong draft; none in every fourth call
        for token in pending_B.tolist():
            row = []
            for place in range(hidden_BKD.shape[1]):
                token = self.next.get(token, token)
                row.append(token if place + 1 != wrong else (token + 1) % len(self.next))
            rows.append(row)
        token_BK = torch.tensor(rows, device=pending_B.device).view(len(pending_B), -1)
        return Drafts(token_BK, torch.full(token_BK.shape, 0.5))


def _config_of(given: PreTrainedModel | PreTrainedConfig | str) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        return given
    if isinstance(given, str):
        if not Path(given).is_file() and is_adapter(given):
            adapter = PeftConfig.from_pretrained(given)
            return AutoConfig.from_pretrained(adapter.base_model_name_or_path, revision=adapter.revision or "main")
        return AutoConfig.from_pretrained(given)
    config = getattr(given.get_base_model() if isinstance(given, PeftModel) else given, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"Expected a transformers model, its config, or its Hub id or folder, but got {type(given).__name__}."
        )
    return config


def _prompt(length: int, seed: int) -> torch.LongTensor:
    return torch.randint(5, 35, (1, length), generator=torch.Generator().manual_seed(seed))


def _generate(model: PreTrainedModel | PeftModel, input_ids: torch.LongTensor, **arguments) -> torch.LongTensor:
    return model.generate(
        input_ids=input_ids,
        **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **arguments},
    )


@torch.no_grad()
def _randomised(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


def _result(
    model: PeftModel, prompts: list[torch.LongTensor], truths: list[torch.LongTensor] | None, **arguments
) -> str:
    """Compares decoding with each row's true output or, if `None`, with plain decoding with the same arguments."""
    longest = max(prompt.shape[1] for prompt in prompts)
    pad = torch.nn.functional.pad
    ids_BT = torch.cat([pad(prompt, (longest - prompt.shape[1], 0)) for prompt in prompts])
    mask_BT = torch.cat([pad(torch.ones_like(prompt), (longest - prompt.shape[1], 0)) for prompt in prompts])
    if truths is None:
        try:
            output = _generate(model, ids_BT, attention_mask=mask_BT, **{**arguments, "mtp": False})
        except Exception as error:  # whatever the model's code raises
            return f"refused by the base: {_first_line(error)}"
        truths = [output[row : row + 1, longest - prompt.shape[1] :] for row, prompt in enumerate(prompts)]
    try:
        output = _generate(model, ids_BT, attention_mask=mask_BT, mtp=True, **arguments)
    except (NotImplementedError, ValueError) as error:
        return f"refused: {_first_line(error)}"
    except Exception as error:  # whatever the model's code raises
        return f"failed: {type(error).__name__}: {_first_line(error)}"
    wrong = [
        row
        for row, (prompt, truth) in enumerate(zip(prompts, truths, strict=True))
        if not torch.equal(output[row, longest:], truth[0, prompt.shape[1] :])
    ]
    return f"differs in {len(wrong)} of {len(prompts)} rows" if wrong else EXACT


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:250]
