"""What training optimises: the weights of the four losses and where targets come from."""

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
        sampler (`float`): Weight of the cross-entropy of the sampler head, which makes the drafts. Without one the
            base's unembedding makes them, see [`Recipe.without_sampler`].
        lcm (`float`): Weight of the latent consistency of last hidden states.
        auxiliary (`float`): Weight of the consistency of intermediate layers' states.
        targets (`"model"`, `"soft"` or `"data"`): Masks learn the base's own likeliest token, the base's whole
            distribution, or the token of the data.
        position_decay (`float`): Weight of the i-th mask relative to the mask before it. A draft counts only if all
            before it were accepted, so early masks are worth more.
        divergence (`"kl"` or `"tv"`): What is measured against the target, cross-entropy or total variation.
    """

    base: float = 0.0
    sampler: float = 1.0
    lcm: float = 1.0
    auxiliary: float = 0.0
    targets: Targets = "soft"
    position_decay: float = 0.8
    divergence: Divergence = "kl"

    def without_sampler(self) -> "Recipe":
        """The recipe for a model without a sampler head: the base's cross-entropy is on, with that one's weight."""
        return replace(self, base=self.base or self.sampler)

    def with_overrides(self, **overrides) -> "Recipe":
        """A copy with every override that is not `None`."""
        return replace(self, **{name: value for name, value in overrides.items() if value is not None})


RECIPES = {
    # Samragh et al.: cross-entropies against the data and latent consistency, equally weighted. No fourth term there.
    "paper": Recipe(base=1.0, sampler=1.0, lcm=1.0, auxiliary=0.0, targets="data", position_decay=1.0),
    # What docs/benchmarks.md shows to give most tokens per step.
    "default": Recipe(),
}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"Unknown recipe {name!r}. Known: {', '.join(map(repr, sorted(RECIPES)))}.")
    return RECIPES[name]
