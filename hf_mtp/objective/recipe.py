"""Weights and targets of the four losses. Knows nothing of how they are computed."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

Targets = Literal["model", "soft", "data"]
TARGETS = get_args(Targets)
Divergence = Literal["kl", "tv"]


@dataclass(frozen=True)
class Recipe:
    """Weights of the losses, and their targets.

    Args:
        base (`float`): Weight of the cross-entropy of masks under the base's unembedding.
        sampler (`float`): Weight of the cross-entropy of the sampler head, which makes the drafts. See
            [`Recipe.without_sampler`] for models that have none.
        lcm (`float`): Weight of the consistency of last hidden states (latent consistency).
        auxiliary (`float`): Weight of the consistency of intermediate layers' states.
        targets (`"model"`, `"soft"` or `"data"`): Masks learn the base's most likely token, the base's full
            distribution, or the token of the data.
        position_decay (`float`): Weight of each mask relative to the mask before it. Early masks are worth more,
            because a draft counts only if all drafts before it were accepted.
        divergence (`"kl"` or `"tv"`): Distance to the target: cross-entropy or total variation.
    """

    base: float = 0.0
    sampler: float = 1.0
    lcm: float = 1.0
    auxiliary: float = 0.0
    targets: Targets = "soft"
    position_decay: float = 0.8
    divergence: Divergence = "kl"

    def without_sampler(self) -> "Recipe":
        """The recipe for a model without a sampler head: if `base` is 0, it gets the weight of `sampler`."""
        return replace(self, base=self.base or self.sampler)

    def with_overrides(self, **overrides) -> "Recipe":
        """A copy with every override that is not `None`."""
        return replace(self, **{name: value for name, value in overrides.items() if value is not None})


RECIPES = {
    # Samragh et al. weight both cross-entropies and latent consistency equally. They have no fourth term.
    "paper": Recipe(base=1.0, sampler=1.0, lcm=1.0, auxiliary=0.0, targets="data", position_decay=1.0),
    # The most tokens per pass in docs/benchmarks.md.
    "default": Recipe(),
}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`, or a `ValueError` if there is none."""
    if name not in RECIPES:
        raise ValueError(f"Unknown recipe {name!r}. Known: {', '.join(map(repr, sorted(RECIPES)))}.")
    return RECIPES[name]
