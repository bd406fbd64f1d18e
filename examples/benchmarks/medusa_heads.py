"""Heads in the manner of Medusa-1, to compare with: each drafts one later token from the base's last hidden state.

After Cai et al., arXiv 2401.10774, and its code: a head is a residual block, x + SiLU(Wx + b) with W = 0 at first. Two
things differ. All heads share the base's own frozen unembedding, because one of their own for each would be as large
as the base. And they learn from the base's whole distribution, as our own adapter does, instead of from one token. The
drafts are a chain, not a tree.

Shapes: B texts, T tokens, A anchors, H heads, D features, V vocabulary, S tokens of a text so far, N columns of a
pass.
"""

import torch
from torch import nn

DECAY = 0.8  # weight of each head's loss over that of the head before
ANCHORS = 256  # trained tokens of a step: with more of them the unembedding takes longer than the base


class MedusaHeads(nn.Module):
    """One residual block for each head.

    Args:
        base ([`~transformers.PreTrainedModel`]): The model whose states the heads read.
        heads (`int`): H. Head h drafts the token h + 2 places after the one whose state it reads.
    """

    def __init__(self, base, heads: int):
        super().__init__()
        features = base.get_output_embeddings().weight.shape[1]
        self.heads = nn.ModuleList(nn.Linear(features, features) for _ in range(heads))
        for head in self.heads:
            nn.init.zeros_(head.weight)

    def forward(self, state_AD: torch.Tensor, head: int) -> torch.Tensor:
        """`(A, D)`: features that the base's unembedding turns into the logits of this head."""
        return state_AD + nn.functional.silu(self.heads[head](state_AD))

    def learn(self, base, ids_BT: torch.LongTensor, state_BTD: torch.Tensor, is_answer_BT: torch.Tensor) -> dict:
        """Adds the gradients of one step.

        Args:
            base ([`~transformers.PreTrainedModel`]): The frozen base.
            ids_BT, state_BTD: Token ids and the base's last states of each text.
            is_answer_BT: Which tokens the model wrote itself. The others are not learned.

        Returns:
            `dict[str, float]`: The loss of the step, and for each head the share of drafts that are the base's choice.
        """
        unembed, report = base.get_output_embeddings(), {"loss": 0.0}
        text_A, token_A = anchors(is_answer_BT, ANCHORS)
        for head in range(len(self.heads)):
            target_A = token_A + head + 1  # its state predicts the token that the head drafts
            in_text_A = (target_A + 1 < is_answer_BT.shape[1]).nonzero()[:, 0]
            in_text_A = in_text_A[is_answer_BT[text_A[in_text_A], target_A[in_text_A] + 1]]
            text, anchor, target = text_A[in_text_A], token_A[in_text_A], target_A[in_text_A]
            with torch.no_grad():
                target_AV = unembed(state_BTD[text, target]).float()
            logits_AV = unembed(self(state_BTD[text, anchor], head)).float()
            loss = DECAY**head * nn.functional.cross_entropy(logits_AV, target_AV.softmax(dim=-1))
            loss.backward()
            report["loss"] += loss.item()
            report[f"accuracy_{head + 1}"] = share_equal(logits_AV, target_AV)
        return report


def anchors(is_answer_BT: torch.Tensor, count: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """`(A,)`, `(A,)`: texts and places of at most `count` tokens, at random, whose next token is the model's own."""
    places_A2 = is_answer_BT[:, 1:].nonzero()
    chosen = places_A2[torch.randperm(len(places_A2))[:count]]
    return chosen[:, 0], chosen[:, 1]


def share_equal(logits_AV: torch.Tensor, target_AV: torch.Tensor) -> float:
    """The share of rows with the same largest logit."""
    return (logits_AV.argmax(dim=-1) == target_AV.argmax(dim=-1)).float().mean().item()


class MedusaDrafter:
    """Drafts by the heads.

    Args:
        heads ([`MedusaHeads`]): The heads, in the base's dtype.
        base ([`~transformers.PreTrainedModel`]): The base.
        count (`int`): Drafts of a pass, at most the number of heads.
    """

    def __init__(self, heads: MedusaHeads, base, count: int):
        self.heads, self.unembed, self.count = heads, base.get_output_embeddings(), count

    def begin(self) -> None:
        """Nothing is kept from pass to pass."""

    def propose(self, ids_1S: torch.LongTensor, state_1ND: torch.Tensor, cache, room: int) -> list[int]:
        """Drafts for the tokens after the last one of the text. Arguments are those of [`speculation.Drafter`]."""
        count = min(self.count, room)
        if not count:
            return []
        state_1D = state_1ND[:, -1]
        feature_HD = torch.cat([self.heads(state_1D, head) for head in range(count)])
        return self.unembed(feature_HD).argmax(dim=-1).tolist()
