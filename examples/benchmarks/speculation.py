"""Greedy speculative decoding with any drafter, as a `custom_generate` of transformers.

    model.generate(**inputs, custom_generate=speculative_generate, drafter=drafter, do_sample=False)

A pass of the model reads the last token and the drafts. The drafts before the first wrong one are kept, so the text is
that of plain decoding. One sequence at a time. Knows nothing of how drafts are made.

Shapes: S tokens of a text so far, N columns of a pass, D features, V vocabulary.
"""

import inspect
from typing import Protocol

import torch

from hf_mtp.base.caches import cache_name


class Drafter(Protocol):
    """What makes drafts."""

    def begin(self) -> None:
        """A new text begins."""

    def propose(self, ids_1S: torch.LongTensor, state_1ND: torch.Tensor, cache, room: int) -> list[int]:
        """Drafts for the tokens after the last one of the text.

        Args:
            ids_1S (`torch.LongTensor` of shape `(1, S)`): The text. The model has not read its last token yet.
            state_1ND (`torch.Tensor` of shape `(1, N, D)`): The model's last states of the tokens that it read in the
                last pass, without rejected drafts. They end with the last but one token of the text.
            cache ([`~transformers.Cache`]): The model's cache of these. It must be the same afterwards.
            room (`int`): The most drafts that can be used.
        """


def speculative_generate(
    model, input_ids, logits_processor, stopping_criteria, generation_config, drafter: Drafter, **model_kwargs
) -> torch.LongTensor:
    """Decodes greedily. Takes and returns what transformers passes to and expects of a `custom_generate`.

    Raises:
        ValueError: Several rows, sampling, or logits processors.
    """
    if len(input_ids) > 1 or generation_config.do_sample or logits_processor:
        raise ValueError(
            f"Peers decode one row greedily and without logits processors, but got {len(input_ids)} rows, "
            f"do_sample={generation_config.do_sample} and {list(logits_processor)}."
        )
    cache = model_kwargs[cache_name(model_kwargs)]
    unread_1N, drafts = input_ids, []
    drafter.begin()
    while True:
        state_1ND, tokens = verify(model, unread_1N, drafts, cache)
        for token in tokens:
            input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], dim=1)
            if stopping_criteria(input_ids, None).all():
                return input_ids
        unread_1N = input_ids[:, -1:]
        drafts = drafter.propose(input_ids, state_1ND, cache, generation_config.max_length - input_ids.shape[1] - 1)


def verify(model, unread_1N: torch.LongTensor, drafts: list[int], cache) -> tuple[torch.Tensor, list[int]]:
    """Reads the unread tokens and the drafts, and rolls back from the first wrong draft on.

    Returns:
        `tuple`: The states of all columns that stay, `(1, N, D)`; the right drafts and the token that follows them.
    """
    column_1N = torch.cat([unread_1N, unread_1N.new_tensor([drafts])], dim=1) if drafts else unread_1N
    outputs = run(model, column_1N, cache, logits_to_keep=len(drafts) + 1, output_hidden_states=True)
    choices = outputs.logits[0].float().argmax(dim=-1).tolist()
    right = next((place for place, draft in enumerate(drafts) if draft != choices[place]), len(drafts))
    wrong = len(drafts) - right
    if wrong:
        cache.crop(-wrong)
    return outputs.hidden_states[-1][:, : column_1N.shape[1] - wrong], choices[: right + 1]


def run(model, ids_1N: torch.LongTensor, cache, **options):
    """A forward pass after the tokens in the cache, whatever this release of transformers calls that argument."""
    name = cache_name(inspect.signature(model.forward).parameters)
    return model(input_ids=ids_1N, **{name: cache, "use_cache": True}, **options)
