"""Drafts whose rightness a test decides, and slow references of what decoding must then do."""

import torch
from tiny_models import VOCAB

from hf_mtp.decoding.drafters.base import Drafts
from hf_mtp.decoding.drafters.masks import MaskDrafter
from hf_mtp.decoding.noise import PositionNoise, draw_seed

RIGHT = {
    "never": lambda position: False,
    "always": lambda position: True,
    "sometimes": lambda position: position % 5 not in (1, 3),
}


class Oracle:
    """Stands in for the drafts of all masks.

    Args:
        monkeypatch: Puts it in place.
        sequences: `(B, S)`, the prompts and what plain decoding makes of them.
        right: Whether the draft for the token at this index of a sequence is right.
    """

    def __init__(self, monkeypatch, sequences, right):
        self.sequences, self.right = sequences, right
        monkeypatch.setattr(MaskDrafter, "propose", lambda drafter, outcome, counts: self.propose(outcome, counts))

    def propose(self, outcome, counts):
        tokens = torch.full((len(counts), max(counts)), -1)
        for index, (row, count) in enumerate(zip(outcome.sequences, counts, strict=True)):
            truth, known = self.sequences[row.row], row.prompt + row.new_tokens
            assert row.ids_1S[0].tolist() == truth[:known].tolist()
            assert not count or known < len(truth), "drafts for a finished output"
            for place in range(count):
                token = truth[known + place].item() if known + place < len(truth) else 0
                tokens[index, place] = token if self.right(known + place) else (token + 1) % VOCAB
        return Drafts(tokens, torch.full(tokens.shape, 0.5))


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


@torch.no_grad()
def sampled_text(base, ids_1S: torch.LongTensor, seed: int, row: int, new_tokens: int, **options) -> list[int]:
    """Slow reference of sampling: the new tokens of a row of a call, one token at a time without a cache.

    Args:
        base: The base model.
        ids_1S: The row's prompt, without padding.
        seed: Of the generator that the call is given.
        row: Its number in the call.
        options: Settings of `generate` that make processors.
    """
    config, _ = base._prepare_generation_config(None, do_sample=True, max_new_tokens=new_tokens, **options)
    length = ids_1S.shape[1]
    processors = base._get_logits_processor(config, input_ids_seq_length=length, encoder_input_ids=ids_1S)
    noise = PositionNoise(draw_seed(torch.Generator().manual_seed(seed)), row, base.config.vocab_size, ids_1S.device)
    for position in range(new_tokens):
        score_1V = processors(ids_1S, base(input_ids=ids_1S).logits[:, -1].float())
        token_1 = (score_1V + noise.at(position)).argmax(dim=-1)
        ids_1S = torch.cat([ids_1S, token_1[:, None]], dim=1)
    return ids_1S[0, length:].tolist()
