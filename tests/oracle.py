"""Drafts whose rightness a test decides, and what decoding must then do."""

import torch
from tiny_models import VOCAB
from transformers.generation.streamers import BaseStreamer

from hf_mtp import GatedLoraModel
from hf_mtp.decoding.drafters.masks import Drafts

RIGHT = {
    "never": lambda position: False,
    "always": lambda position: True,
    "sometimes": lambda position: position % 5 not in (1, 3),
}


class Oracle(BaseStreamer):
    """Stands in for an adapter's `draft`. Pass it as `streamer` too, so that it knows the output so far.

    Args:
        monkeypatch: Puts it in place.
        sequence: `(1, S)`, the prompt and what plain decoding makes of it.
        right: Whether the draft for the token at this index of the sequence is right.
    """

    def __init__(self, monkeypatch, sequence, right):
        self.sequence, self.right = sequence[0], right
        self.streamed, self.ends = [], 0
        monkeypatch.setattr(GatedLoraModel, "draft", self.draft)

    def put(self, value):
        assert not self.ends
        self.streamed += value.flatten().tolist()

    def end(self):
        self.ends += 1

    def draft(self, pending, hidden_BKD, draw=None):
        known = len(self.streamed)
        assert pending.tolist() == self.streamed[-1:]
        assert known < len(self.sequence), "drafts for a finished output"
        positions = range(known, known + hidden_BKD.shape[1])
        tokens = [self.sequence[p].item() if p < len(self.sequence) else 0 for p in positions]
        drafts = [token if self.right(p) else (token + 1) % VOCAB for p, token in zip(positions, tokens, strict=True)]
        tokens = torch.tensor([drafts], dtype=torch.long)
        return Drafts(tokens, torch.full(tokens.shape, 0.5), torch.zeros(1, dtype=torch.bool))


def expected_steps(right, start: int, new_tokens: int, k: int, strategy: str) -> list[tuple[int, int]]:
    """Slow reference of the decode loop: (drafts verified, drafts accepted) of each forward pass.

    Knows no models: right drafts are accepted up to the first wrong one, and one token of the base's own follows.
    """
    steps, done, drafts = [], 0, []
    while done < new_tokens:
        drafts = drafts[: new_tokens - done - 1]
        masks = min(k, new_tokens - done - 2)
        accepted = drafts.index(False) if False in drafts else len(drafts)
        steps.append((len(drafts), accepted))
        done += accepted + 1
        all_right = accepted == steps[-1][0]
        drafts = [right(start + done + i) for i in range(masks)] if strategy == "quadratic" or all_right else []
    return steps
