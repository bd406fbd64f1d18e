"""Decoding methods that are compared on SmolLM2: transformers' own, peers that were trained, and ours.

Knows models, drafters and arguments of `generate`. Knows nothing of prompts, files of results or tables.
"""

from functools import cached_property
from pathlib import Path

import torch
from eagle_head import EagleDrafter
from medusa_heads import MedusaDrafter
from methods import PEERS, Method, Models, mtp
from peer_training import K, load_peer
from peft import PeftModel
from speculation import speculative_generate
from two_pass import TwoPassDrafter

OURS = ("ours, auto", "ours, quadratic", "ours as shipped, auto", "ours as shipped, quadratic")


class PeerModels(Models):
    """[`Models`] of the adapter that ships, and peers that decode with the same base.

    Args:
        base, adapter, dtype: As in [`Models`].
        trained (`Path`): Folder of the adapter and the heads that `peer_training` made.
    """

    def __init__(self, base: str, adapter: Path, trained: Path, dtype: str = "auto"):
        super().__init__(base, adapter, dtype)
        self.trained = trained

    @cached_property
    def equal(self) -> PeftModel:
        """The base with an adapter that was trained for the same minutes as the peers."""
        return self.with_adapter(self.trained / "ours" / "adapter")

    @cached_property
    def medusa(self):
        return load_peer("medusa", self.base, self.trained)

    @cached_property
    def eagle(self):
        return load_peer("eagle", self.base, self.trained)


class Late:
    """A drafter that is made when it first decodes, so that the methods can be listed without loading any model.

    Args:
        make (`Callable`): Makes the drafter.
    """

    def __init__(self, make):
        self.make = make

    @cached_property
    def drafter(self):
        return self.make()

    def begin(self) -> None:
        self.drafter.begin()

    def propose(self, *args) -> list[int]:
        return self.drafter.propose(*args)


def drafted(make, model: str = "base") -> Method:
    """A method that verifies the drafts of the drafter that `make` makes."""
    return Method(model, {"custom_generate": speculative_generate, "drafter": Late(make)})


def families(models: PeerModels) -> dict[str, dict[str, Method]]:
    """Family to setting to method, of all methods but plain decoding. `ours` and the peers were trained alike."""

    def two_passes(model: str) -> dict[str, Method]:
        masks = (2, K)
        return {f"k={n}": drafted(lambda n=n: TwoPassDrafter(getattr(models, model), n), model) for n in masks}

    return {
        **PEERS,
        "Medusa-style heads": {
            f"k={n}": drafted(lambda n=n: MedusaDrafter(models.medusa, models.base, n)) for n in (1, 2, K)
        },
        "EAGLE-style head": {
            f"k={n}": drafted(lambda n=n: EagleDrafter(models.eagle, models.base, n)) for n in (1, 2, 4)
        },
        "two passes": two_passes("equal"),
        "ours, auto": {f"k={K}": mtp(model="equal")},
        "ours, quadratic": {f"k={n}": mtp("quadratic", n, "equal") for n in (2, K)},
        "two passes, adapter as shipped": two_passes("adapter"),
        "ours as shipped, auto": {"k=8": mtp()},
        "ours as shipped, quadratic": {f"k={n}": mtp("quadratic", n) for n in (2, K)},
    }


def refused_generators(models: PeerModels) -> dict[str, str]:
    """What transformers' other candidate generators say to this model: they need weights that it does not have."""
    options = {
        "native MTP": {"use_mtp": True},
        "DFlash": {"speculation_type": "dflash", "assistant_model": models.small_draft},
    }
    return {name: refusal(models, asked) for name, asked in options.items()}


def refusal(models: PeerModels, options: dict) -> str:
    """The error of `generate` with these options, or `"runs"`."""
    ids_1T = torch.tensor([[models.tokenizer.bos_token_id]], device=models.base.device)
    try:
        models.base.generate(input_ids=ids_1T, max_new_tokens=4, do_sample=False, **options)
    except Exception as error:  # whatever it is, it is what a user would see
        return f"{type(error).__name__}: {error}"
    return "runs"
