"""What is told from accepted drafts, against stepping through them, and against decoding itself."""

import pytest
import torch
from tiny_models import VOCAB, generate, prompt, upgraded

from hf_mtp.decoding.drafters import masks
from hf_mtp.layout.blocks import IGNORE
from hf_mtp.objective.request import ObjectiveRequest
from hf_mtp.objective.simulation import SimulatedDecoding, mean_tokens_per_pass, simulate_decoding


def test_mean_tokens_per_pass():
    accepted = torch.rand(50, 4) < 0.7
    total = 0
    for block in accepted.tolist():
        total += 1
        for draft in block:
            if not draft:
                break
            total += 1
    torch.testing.assert_close(mean_tokens_per_pass(accepted), torch.tensor(total / 50))
    assert mean_tokens_per_pass(torch.ones(3, 4, dtype=torch.bool)) == 5
    assert mean_tokens_per_pass(torch.zeros(3, 4, dtype=torch.bool)) == 1


def test_a_walk_by_hand():
    # Blocks of two on columns 2 to 5 of eight: the text from column 3 to 7 is foreseen.
    anchors = torch.tensor([[2, 2, 3, 3, 4, 4, 5, 5]])
    right = torch.tensor([[1, 1, 1, 0, 0, 0, 1, 0]], dtype=torch.bool)
    useful = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    # The prompt gives column 3; from 2 to 5 at once, giving 4 to 6; from 5 the last one, 7.
    assert simulate_decoding(anchors, right, useful, 2) == SimulatedDecoding(tokens=5, passes=3)
    assert simulate_decoding(anchors, torch.zeros_like(right), useful, 2) == SimulatedDecoding(tokens=5, passes=5)
    # Two texts in a row.
    apart = anchors + torch.tensor([0, 0, 0, 0, 9, 9, 9, 9])
    assert simulate_decoding(apart, torch.zeros_like(right), useful, 2) == SimulatedDecoding(tokens=6, passes=6)


@pytest.mark.parametrize("config", [{}, {"sampler": False}, {"sampler_recurrent": True}])
@pytest.mark.parametrize("k", [1, 3])
def test_a_walk_through_the_bases_own_text_is_quadratic_decoding(k, config, trained, monkeypatch):
    monkeypatch.setattr(masks, "SHORTLIST", VOCAB)  # else decoding looks for drafts among the likeliest tokens only
    model, new_tokens, accepted = trained(k, config), 40, 0
    for seed in range(4):
        ids = prompt(6, seed=seed)
        text = generate(model, ids, new_tokens, mtp=True, mtp_strategy="quadratic")
        statistics = model.base_model.mtp_statistics
        labels = text.clone()
        labels[:, :6] = IGNORE
        with torch.no_grad():
            simulated = model(
                input_ids=text, labels=labels, mtp_objective=ObjectiveRequest(masks_per_part=30)
            ).simulated
        assert simulated == SimulatedDecoding(tokens=statistics.tokens, passes=statistics.forward_passes)
        accepted += statistics.accepted
    assert accepted > 0


@pytest.fixture(scope="module")
def trained():
    """A model whose adapter has learnt a little, so that some drafts are right."""

    def train(k: int, config: dict):
        torch.manual_seed(0)
        model = upgraded("llama", k, dtype=torch.float64, **config).double()
        texts = torch.cat([generate(model, prompt(6, seed=seed), 40) for seed in range(4)])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(25):
            optimizer.zero_grad()
            model(input_ids=texts, mtp_objective=ObjectiveRequest()).loss.backward()
            optimizer.step()
        return model

    return train
