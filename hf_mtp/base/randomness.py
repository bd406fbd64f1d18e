"""Seeded random numbers that leave the process's global random state unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _DrawsFrom(TorchDispatchMode):
    """Passes a seeded generator to every operation of this thread that draws random numbers."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed, self.generators = seed, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        # Functions such as `rand` accept a generator only in a separate overload.
        own_form = "generator" if func._overloadname == "default" else f"{func._overloadname}_generator"
        if own_form in func.overloadpacket.overloads():
            func = getattr(func.overloadpacket, own_form)
        takes_one = any(argument.name == "generator" for argument in func._schema.arguments)
        if takes_one and kwargs.get("generator") is None:
            kwargs["generator"] = self._generator(args, kwargs)
        return func(*args, **kwargs)

    def _generator(self, args: tuple, kwargs: dict) -> torch.Generator | None:
        tensor = next((value for value in args if isinstance(value, torch.Tensor)), None)
        device = torch.device(kwargs.get("device") or "cpu") if tensor is None else tensor.device
        if device.type == "meta":
            return None
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Within the context, all random draws of torch in this thread come from generators seeded with `seed`."""
    with _DrawsFrom(seed):
        yield
