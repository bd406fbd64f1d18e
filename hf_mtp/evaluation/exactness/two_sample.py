"""A two-sample test for sampled texts: do two sampling methods have the same distribution?

Shapes: N texts, S = 2 N, L positions, W pairs of a position and a token, P permutations.
"""

import torch

PERMUTATIONS = 9_999
_AT_ONCE = 500  # permutations of one matrix product


def p_value(one_NL: torch.LongTensor, other_NL: torch.LongTensor, seed: int = 0) -> float:
    """Probability of a difference at least this large between two samples of texts of one distribution.

    A permutation test (Fisher; Good, "Permutation Tests", 2000). The statistic is the two-sample chi-square of token
    counts, summed over positions. The texts of both samples are shuffled, which is exact for any distribution of
    texts, however few there are.

    Args:
        one_NL, other_NL (`torch.LongTensor` of shape `(N, L)`): Token ids of each text, with a negative id where it
            has ended.
        seed (`int`, *optional*, defaults to 0): Seed of the shuffles.

    Returns:
        `float` between 0.0001 and 1. Small values say that the distributions differ.
    """
    generator = torch.Generator().manual_seed(seed)
    seen_SW = _indicators(torch.cat([one_NL, other_NL]).cpu())
    of_one_S = torch.cat([torch.ones(len(one_NL)), torch.zeros(len(other_NL))])
    observed = _statistic(of_one_S[None], seen_SW)
    as_large, left = 1, PERMUTATIONS
    while left:
        shuffled_PS = torch.stack(
            [of_one_S[torch.randperm(len(of_one_S), generator=generator)] for _ in range(min(left, _AT_ONCE))]
        )
        as_large += int((_statistic(shuffled_PS, seen_SW) >= observed - 1e-4).sum())
        left -= len(shuffled_PS)
    return as_large / (PERMUTATIONS + 1)


def _indicators(text_SL: torch.LongTensor) -> torch.Tensor:
    """`(S, W)`: whether a text has a token at a position, for all pairs that occur."""
    columns = [torch.unique(column_S, return_inverse=True)[1] for column_S in text_SL.unbind(dim=1)]
    return torch.cat([torch.nn.functional.one_hot(column_S).float() for column_S in columns], dim=1)


def _statistic(of_one_PS: torch.Tensor, seen_SW: torch.Tensor) -> torch.Tensor:
    """`(P,)`: chi-square of the counts in the first sample, for each way to divide the texts."""
    total_W, share = seen_SW.sum(dim=0), of_one_PS[0].mean()
    expected_W = total_W * share
    return ((of_one_PS @ seen_SW - expected_W) ** 2 / expected_W).sum(dim=1)
