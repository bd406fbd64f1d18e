"""`hf_mtp.evaluation.compare`: what is timed, and that comparing leaves the models as they are."""

import pytest
import torch
from tiny_models import prompt, tiny_base, upgraded

from hf_mtp.evaluation import compare, decoded


@pytest.fixture
def models():
    """A base, and the same weights with an adapter."""
    base = tiny_base()
    return base, upgraded(compare.same_weights(base))


def test_a_model_without_an_adapter_is_timed_as_one_with_it(models):
    base, model = models
    prompts = prompt().tolist()
    compare.warm_up(model, prompts[0])  # the costs of passes are measured in passes of their own
    plain, fast = decoded.decode_rows(base, prompts, 12), decoded.decode_rows(model, prompts, 12, mtp=True)
    assert plain.rows == fast.rows and plain.forward_passes == plain.tokens == len(plain.steps)
    assert sum(fast.steps) == fast.tokens and len(fast.steps) == fast.forward_passes
    assert min(plain.seconds, fast.seconds) > 0


def test_a_copy_shares_the_weights_and_nothing_else(models):
    base, model = models
    shared = {tensor.data_ptr() for tensor in model.parameters()}
    assert all(tensor.data_ptr() in shared for tensor in base.parameters())
    assert not any("lora" in name for name, _ in base.named_modules())
    model.get_base_model().generation_config.max_length = 77
    assert base.generation_config.max_length != 77


def test_sampling_and_batches_are_timed_too(models):
    base, _ = models
    rows = prompt(rows=3)
    torch.manual_seed(0)
    new_BN, passes, seconds = decoded.timed_generate(base, rows, max_new_tokens=5, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(new_BN, base.generate(rows, max_new_tokens=5, do_sample=True)[:, rows.shape[1] :])
    assert new_BN.shape[0] == 3 and passes == new_BN.shape[1] and seconds > 0
