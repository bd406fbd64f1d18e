"""Prompts on the CPU for a model on another device, which transformers' `generate` accepts, too."""

from collections.abc import Callable

import torch

PROMPT_ARGUMENTS = ("inputs", "input_ids", "inputs_embeds")


def to_device(kwargs: dict, device: torch.device) -> tuple[dict, Callable]:
    """Moves the tensors among the arguments of `generate` to a model's device, if its prompt is on the CPU.

    Args:
        kwargs (`dict`): Arguments of `generate`.
        device (`torch.device`): Where the model reads token ids.

    Returns:
        The arguments, and a function that moves what `generate` returns to where plain decoding returns it.
    """
    prompts = (kwargs.get(name) for name in PROMPT_ARGUMENTS)
    home = next((prompt.device for prompt in prompts if isinstance(prompt, torch.Tensor)), device)
    if home.type != "cpu" or device.type == "cpu":
        return kwargs, lambda output: output
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    return moved, lambda output: _returned(output, home)


def _returned(output, home: torch.device):
    """Token ids, or an output with ids and scores, on the prompt's device. Hidden states stay on the model's."""
    if isinstance(output, torch.Tensor):
        return output.to(home)
    output.sequences = output.sequences.to(home)
    for name in ("scores", "logits"):
        if (values := getattr(output, name)) is not None:
            setattr(output, name, tuple(value.to(home) for value in values))
    return output
