"""Placeholders: ordinary tokens or embeddings that an untouched base processes in place of masks.

Shapes: B batch, T tokens, M masks per row, E size of an embedding.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...base.embedding import mean_embedding
from ...layout.blocks import BlockLayout
from ...passes.training_pass import TrainingPass

REPEATED, MEAN = "last token repeated", "mean embedding"


@dataclass(frozen=True)
class Placeholder:
    """One kind of placeholder.

    Args:
        name (`str`): Its name in tables and results.
        token (`int`, *optional*): The token to read. `None`: the token that the placeholders follow, once more.
        embedding_E (`torch.Tensor` of shape `(E,)`, *optional*): What to embed it as, if not as the token itself.
    """

    name: str
    token: int | None = None
    embedding_E: torch.Tensor | None = None

    def states(self, states: TrainingPass, chunk: BlockLayout, input_ids_BT: torch.LongTensor) -> torch.Tensor:
        """`(B, M, D)`: last hidden states of the base at the placeholders of one chunk of blocks.

        Args:
            states ([`~hf_mtp.passes.training_pass.TrainingPass`]): The pass that read the text.
            chunk ([`BlockLayout`]): One of `chunks`.
            input_ids_BT (`torch.LongTensor` of shape `(B, T)`): The text.
        """
        last_BM = input_ids_BT.gather(1, chunk.anchor_BM)
        ids_BM = last_BM if self.token is None else torch.full_like(last_BM, self.token)
        return states.placeholders(chunk, ids_BM, self.embedding_E)[-1]


def placeholders_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Placeholder], dict[str, str]]:
    """The kinds of placeholder that a model has.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.

    Returns:
        The placeholders, and for each kind that the tokenizer does not have the reason, by name.
    """
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    tokens = {
        "end of sequence": tokenizer.eos_token_id,
        "newline": newline[0] if len(newline) == 1 else None,
        "padding": tokenizer.pad_token_id,
    }
    found, left_out = [Placeholder(REPEATED)], {}
    for name, token in tokens.items():
        same = next((one.name for one in found if one.token == token), None)
        if token is None:
            left_out[name] = "The tokenizer has no such token."
        elif same is not None:
            left_out[name] = f"It is the same token as {same}."
        else:
            found.append(Placeholder(name, token))
    return [*found, Placeholder(MEAN, 0, mean_embedding(model))], left_out
