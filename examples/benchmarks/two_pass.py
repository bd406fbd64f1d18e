"""A decoder of Uno's shape, to compare with: one pass of the base drafts, and another one verifies.

Uno (arXiv 2609.04010) drafts by a pass over tokens of noise, through a LoRA on these, and verifies in a pass of the
base alone. Here the masks of our own adapter stand for the noise, and its sampler head chooses the drafts; Uno has no
such head. The difference to `generate(mtp=True)` is that drafting takes a pass of its own. This pass reads the last
token, too, so that its first draft is the base's own choice and always right.

Shapes: K masks, D features, S tokens of a text so far, N columns of a pass.
"""

import torch
from speculation import run

from hf_mtp.adapter.prepared import PreparedLora


class TwoPassDrafter:
    """Drafts by a pass of its own over the last token and masks.

    Args:
        adapter ([`~peft.PeftModel`]): The upgraded model. It must be what decodes, too, so that the cache fits.
        masks (`int`): K, at most the adapter's k. A pass drafts K + 1 tokens.
    """

    def __init__(self, adapter, masks: int):
        self.tuner, self.masks = adapter.base_model, masks

    def begin(self) -> None:
        """Nothing is kept from pass to pass but LoRA weights, which are prepared once for each text."""
        self.lora = PreparedLora()

    def propose(self, ids_1S: torch.LongTensor, state_1ND: torch.Tensor, cache, room: int) -> list[int]:
        """Drafts for the tokens after the last one of the text. Arguments are those of [`speculation.Drafter`]."""
        masks = min(self.masks, room - 1)
        if masks < 1:
            return []
        index_1K = torch.arange(masks, device=ids_1S.device)[None]
        column_1N = torch.cat([ids_1S[:, -1:], self.tuner.vocab_size + index_1K], dim=1)
        with self.tuner.masks_in_columns(1, index_1K, self.lora), self.tuner.capture_hidden_states() as captured:
            run(self.tuner.model, column_1N, cache, logits_to_keep=1)
        cache.crop(-column_1N.shape[1])
        first_1 = self.tuner.unembedding()(captured.states[:, 0]).argmax(dim=-1)
        drafts = self.tuner.draft(first_1, captured.states[:, 1:])
        return [first_1.item(), *drafts.tokens[0]]
