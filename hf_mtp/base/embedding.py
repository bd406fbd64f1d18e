"""What a base model embeds tokens as, and other embeddings in their place. Knows nothing of adapters.

Shapes: B batch, T columns, E size of an embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from .distributed import whole_weight
from .inspection import input_device, weight_shape

IDS_PER_CALL = 4096
SAMPLED_TOKENS = 4096


@torch.no_grad()
def mean_embedding(model: PreTrainedModel) -> torch.Tensor:
    """`(E,)`: the mean over the vocabulary of what the model embeds a token as, scaling included; in float32."""
    embedding = model.get_input_embeddings()
    vocabulary = torch.arange(weight_shape(embedding)[0], device=input_device(model))
    sums = [embedding(ids[None])[0].float().sum(dim=0) for ids in vocabulary.split(IDS_PER_CALL)]
    return torch.stack(sums).sum(dim=0) / len(vocabulary)


def random_embedding(model: PreTrainedModel, tokens: int) -> nn.Embedding:
    """An embedding of new tokens, drawn with the mean and standard deviation that the model's own has in each feature.

    On the meta device, or over an embedding there, nothing is drawn.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        tokens (`int`): How many tokens.
    """
    known = model.get_input_embeddings()
    new = nn.Embedding(tokens, weight_shape(known)[1])
    if new.weight.device.type != "meta" and known.weight.device.type != "meta":
        with whole_weight(known) as table:
            sample = table.detach()[:: max(1, len(table) // SAMPLED_TOKENS)].float().cpu()
        nn.init.normal_(new.weight)
        new.weight.data.mul_(sample.std(dim=0)).add_(sample.mean(dim=0))
    return new


@contextmanager
def last_columns_embedded_as(model: PreTrainedModel, columns: int, embedding_E: torch.Tensor | None) -> Iterator[None]:
    """Within, the last columns of every input are embedded as one vector, whatever their ids are.

    Layers that read token ids themselves still read these.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base.
        columns (`int`): Number of columns, at least 1.
        embedding_E (`torch.Tensor` of shape `(E,)`, *optional*): The vector. If `None`, nothing changes.
    """
    if embedding_E is None:
        yield
        return

    def replace(layer: nn.Module, args: tuple, embedded_BTE: torch.Tensor) -> torch.Tensor:
        replaced = embedded_BTE.clone()
        replaced[:, -columns:] = embedding_E.to(replaced.dtype)
        return replaced

    hook = model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
