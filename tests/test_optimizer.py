"""Muon over many matrices at a time computes what torch computes for each alone."""

import pytest
import torch

from hf_mtp.training.optimizer import Muon


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch is too old to compare with")
def test_matrices_that_go_together_are_trained_as_each_alone():
    shapes = [(4, 32)] * 3 + [(32, 4)] * 2 + [(8, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    together = Muon(ours, lr=0.02, weight_decay=0.1)
    alone = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn_like(mine)
            mine.grad, other.grad = (None, None) if number == step else (gradient, gradient.clone())
        together.step()
        alone.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-3 * 0.02)
