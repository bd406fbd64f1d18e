"""What is said of the machine, and how its faster dtype is found."""

import torch

from hf_mtp.base import machine


def test_the_faster_dtype_is_found_by_trying(monkeypatch):
    state = torch.get_rng_state()
    clock, step = [0.0], {torch.bfloat16: 1.0, torch.float32: 2.0}
    ones = torch.ones

    def made(*size, dtype):
        made.dtype = dtype
        return ones(*size, dtype=dtype)

    def now():
        clock[0] += step[made.dtype]
        return clock[0]

    monkeypatch.setattr(machine.torch, "ones", made)
    monkeypatch.setattr(machine.time, "perf_counter", now)
    assert machine.bfloat16_is_faster(size=4) is True
    step[torch.bfloat16] = 3.0
    assert machine.bfloat16_is_faster(size=4) is False
    assert torch.equal(torch.get_rng_state(), state)
