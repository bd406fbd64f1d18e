"""Simulates decoding of a known text: counts forward passes from which drafts are right, without a model.

Pure functions of tensors. C blocks, B rows, M masks per row, k masks per block.
"""

from dataclasses import dataclass

import torch


@dataclass
class SimulatedDecoding:
    """Counts of greedy decoding of a known text.

    Args:
        tokens (`int`): Tokens returned.
        passes (`int`): Forward passes, including those over the prompts.
    """

    tokens: int = 0
    passes: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per forward pass. Plain decoding has 1."""
        return self.tokens / self.passes if self.passes else 0.0

    def __add__(self, other: "SimulatedDecoding") -> "SimulatedDecoding":
        return SimulatedDecoding(self.tokens + other.tokens, self.passes + other.passes)


def mean_tokens_per_pass(accepted_CK: torch.BoolTensor) -> torch.Tensor:
    """1 + sum_i prod_{j<=i} accept_j, averaged over blocks: the tokens that a step from a random token returns.

    Real decoding gets fewer tokens per pass, because it takes more steps in hard stretches than in easy ones. See
    [`simulate_decoding`].

    Args:
        accepted_CK (`torch.BoolTensor` of shape `(C, K)`): Whether each draft is the base's own choice. False beyond
            the end of the text.

    Returns:
        `torch.Tensor`, a scalar between 1 and K + 1.
    """
    return 1 + accepted_CK.float().cumprod(dim=1).sum(dim=1).mean()


@torch.compiler.disable
def simulate_decoding(
    anchor_BM: torch.LongTensor, accepted_BM: torch.BoolTensor, supervised_BM: torch.BoolTensor, k: int
) -> SimulatedDecoding:
    """Simulates quadratic decoding of a text in which every token has a block, as if the base had written the text.

    A step at column c returns the correct drafts and one more token. The next step starts at the last correct
    draft, or at c + 1 if no draft was correct.

    Args:
        anchor_BM (`torch.LongTensor` of shape `(B, M)`): Column of each mask's anchor.
        accepted_BM (`torch.BoolTensor` of shape `(B, M)`): Whether each draft is the base's own choice.
        supervised_BM (`torch.BoolTensor` of shape `(B, M)`): Whether each mask has a token to predict.
        k (`int`): Masks per block.
    """
    total = SimulatedDecoding()
    accepted_BA = accepted_BM.view(len(accepted_BM), -1, k).long().cumprod(dim=2).sum(dim=2)
    for anchors, accepted, useful in zip(
        anchor_BM[:, ::k].tolist(), accepted_BA.tolist(), supervised_BM[:, ::k].tolist(), strict=True
    ):
        blocks = zip(anchors, accepted, useful, strict=True)
        by_column = {column: right for column, right, is_used in blocks if is_used}
        for first in by_column:
            if first - 1 not in by_column:  # a text begins; the pass over its prompt returns one token
                total += _decode_text(by_column, first)
    return total


def _decode_text(accepted: dict[int, int], first: int) -> SimulatedDecoding:
    last = first
    while last + 1 in accepted:
        last += 1
    passes, column = 1, first
    while column <= last:
        passes, column = passes + 1, column + 1 + accepted[column]
    return SimulatedDecoding(tokens=last + 2 - first, passes=passes)
