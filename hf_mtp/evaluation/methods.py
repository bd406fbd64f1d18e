"""The decoding methods that are compared: plain decoding, prompt lookup, and each strategy with each k."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..decoding.generate import STRATEGIES

PLAIN, PROMPT_LOOKUP = "plain", "prompt lookup"
PAPER_K = (1, 4, 8)  # the columns of the paper's table
LOOKUP_TOKENS = 8  # drafts per pass of prompt lookup, as in transformers' own examples


@dataclass(frozen=True)
class DecodingMethod:
    """One decoding method.

    Args:
        strategy (`str`): `"plain"`, `"prompt lookup"` or a value of `mtp_strategy`.
        k (`int`, *optional*): Masks per block, for the strategies.
    """

    strategy: str
    k: int | None = None

    @property
    def name(self) -> str:
        """Its name in tables and results, such as `"quadratic, k=4"`."""
        return self.strategy if self.k is None else f"{self.strategy}, k={self.k}"

    @property
    def options(self) -> dict:
        """The arguments of `generate`."""
        if self.strategy == PLAIN:
            return {}
        if self.strategy == PROMPT_LOOKUP:
            return {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        return {"mtp": True, "mtp_strategy": self.strategy, "mtp_k": self.k}


def methods_of(strategies: Sequence[str], ks: Sequence[int] | None, trained_k: int) -> list[DecodingMethod]:
    """Plain decoding, prompt lookup, and every strategy with every k.

    Args:
        strategies (`Sequence[str]`): Values of `mtp_strategy`.
        ks (`Sequence[int]`, *optional*): Masks per block, for every strategy. By default the adapter's k, and for
            `"quadratic"` also those of the paper's table that are smaller.
        trained_k (`int`): The adapter's k.

    Raises:
        ValueError: A strategy is unknown, or a k is not between 1 and the adapter's.
    """
    unknown = [strategy for strategy in strategies if strategy not in STRATEGIES]
    if unknown or not strategies:
        raise ValueError(
            f"`strategies` must be one or more of {', '.join(map(repr, STRATEGIES))}, but got {list(strategies)}."
        )
    wrong = [k for k in ks or () if not 1 <= k <= trained_k]
    if wrong:
        raise ValueError(f"`k` must be between 1 and {trained_k}, the adapter's k, but got {wrong}.")
    of_paper = sorted({*(k for k in PAPER_K if k < trained_k), trained_k})
    chosen = {
        strategy: sorted(set(ks)) if ks else of_paper if strategy == "quadratic" else [trained_k]
        for strategy in dict.fromkeys(strategies)
    }
    return [
        DecodingMethod(PLAIN),
        DecodingMethod(PROMPT_LOOKUP),
        *(DecodingMethod(strategy, k) for strategy in chosen for k in chosen[strategy]),
    ]
