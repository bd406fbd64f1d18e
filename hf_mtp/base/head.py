"""The prediction head: the layers that turn the decoder's last hidden states into logits.

In most models the unembedding is all of it. BERT-like models transform the states first, perhaps to another size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .inspection import decoder_of, evaluation_mode, input_device, weight_shape

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PredictionHead:
    """The layers from hidden states to logits, one after the other.

    Args:
        names (`tuple[str, ...]`): Names of the layers; empty if the output embeddings are the only one.
        hidden_size (`int`): D, the size of the hidden states that the first layer reads.
    """

    names: tuple[str, ...]
    hidden_size: int

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """The modules that the model has under these names now."""
        return [model.get_submodule(name) for name in self.names] or [model.get_output_embeddings()]


def prediction_head(model: PreTrainedModel) -> PredictionHead:
    """Finds the prediction head of a base model.

    A short forward pass finds it if the model has weights besides its decoder and its output embeddings. If the model
    cannot run, its output embeddings are assumed to be the whole head.

    Raises:
        ValueError: The output embeddings read another size than the decoder returns, and no layers were found that
            convert one to the other.
    """
    unembedding, decoder = model.get_output_embeddings(), decoder_of(model)
    simple = PredictionHead((), weight_shape(unembedding)[1])
    others = [part for part in model.children() if part is not unembedding and decoder not in part.modules()]
    if not others and not list(model.parameters(recurse=False)):
        return simple
    try:
        hidden_BTD, calls = _trial(model, decoder)
        names = _path(hidden_BTD, calls, unembedding)
    except Exception as error:  # whatever a model's code raises
        logger.debug("%s could not be run: %s", type(model).__name__, error)
        return simple
    if names is not None:
        return PredictionHead(names, hidden_BTD.shape[-1])
    if hidden_BTD.shape[-1] != simple.hidden_size:
        raise ValueError(
            f"{type(model).__name__} cannot be upgraded: its decoder returns hidden states of size "
            f"{hidden_BTD.shape[-1]}, but its output embeddings read size {simple.hidden_size}. This is supported "
            "only if each layer between the two takes and returns a single tensor."
        )
    return simple


@dataclass
class _Call:
    name: str
    layer: nn.Module
    read: torch.Tensor
    gave: torch.Tensor


@torch.no_grad()
def _trial(model: PreTrainedModel, decoder: nn.Module) -> tuple[torch.Tensor, list[_Call]]:
    """The decoder's states, `(B, T, D)`, and all calls of layers outside it, inner ones before outer ones."""
    calls, states = [], []
    inside = set(decoder.modules())

    def record(name: str, layer: nn.Module, args: tuple, output) -> None:
        if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            calls.append(_Call(name, layer, args[0], output))

    hooks = [decoder.register_forward_hook(lambda _, args, outputs: states.append(outputs.last_hidden_state))]
    hooks += [
        layer.register_forward_hook(lambda *call, name=name: record(name, *call))
        for name, layer in model.named_modules()
        if layer not in inside
    ]
    ids_BT = torch.arange(1, 6, device=input_device(model))[None] % weight_shape(model.get_input_embeddings())[0]
    try:
        with evaluation_mode(model):
            model(input_ids=ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return states[-1], calls


def _path(hidden_BTD: torch.Tensor, calls: list[_Call], unembedding: nn.Module) -> tuple[str, ...] | None:
    """Names of the layers from the states to the logits, in order; `None` if the calls form no such path."""
    last = [call for call in calls if call.layer is unembedding][-1:]
    if not last or _is_same(last[0].read, hidden_BTD):
        return () if last else None
    names, wanted = [], last[0].gave
    for call in reversed(calls):  # outer ones first
        if _is_same(call.gave, wanted):
            names.insert(0, call.name)
            wanted = call.read
            if _is_same(wanted, hidden_BTD):
                return tuple(names)
    return None


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.device), other)
