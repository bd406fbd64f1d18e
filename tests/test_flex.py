"""Flex attention takes the same rule in a form of its own, and decodes and trains by it.

Its kernel is compiled, which takes seconds for each, and torch's for CPUs does not compile for every size. What it is
given is tested here; the computation is torch's own reference, which is not compiled.
"""

import pytest
import torch
from layouts import cached_columns, masked_states, step_layout
from test_attention import packed_batch
from tiny_models import generate, prompt, tiny_base, upgraded

from hf_mtp.evaluation.support import Rehearsal
from hf_mtp.layout.attention import AttentionKind, allowed_attention, attention_masks, in_blocks
from hf_mtp.layout.blocks import training_layout
from hf_mtp.objective.request import ObjectiveRequest
from hf_mtp.passes.speculation_mode import SpeculationMode, speculation_mode

flex_attention = pytest.importorskip("torch.nn.attention.flex_attention", reason="torch 2.5 brought flex attention")
pytestmark = [
    pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.6 can leave kernels uncompiled"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),  # transformers' own call
]


@pytest.fixture(autouse=True)
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def with_flex(architecture: str, **options):
    model = upgraded(tiny_base(architecture, torch.float64, **options), dtype=torch.float64).double()
    model.get_base_model().set_attn_implementation("flex_attention")
    return model


def test_blocks_hold_the_rule():
    layout = step_layout(3, past=2, anchors=3, k=2)
    cached, kind = cached_columns(layout, 2), AttentionKind("sliding_attention", window=3)
    mask = attention_masks(layout, [kind], in_blocks, cached)
    assert mask.shape == (1, 1, 9, 11)
    held = flex_attention.create_mask(mask.mask_mod, 1, None, 9, 11, device="cpu")
    assert torch.equal(held[:, 0], allowed_attention(layout, cached, kind))


@pytest.mark.parametrize(
    ("architecture", "rows", "cache"),
    [("llama", 1, "static"), ("gemma3_text", 3, None), ("mistral", 1, None)],
)
def test_decoding_is_exact(architecture, rows, cache):
    model, ids = with_flex(architecture), prompt(11, rows)
    mask = (torch.arange(11) >= 2 * torch.arange(rows)[:, None]).long()
    plain = generate(model, ids, attention_mask=mask)
    model.base_model.draft = Rehearsal([row[None] for row in plain])
    for strategy in ("quadratic", "linear", "auto"):
        how = {"mtp": True, "mtp_strategy": strategy, "cache_implementation": cache}
        assert torch.equal(generate(model, ids, attention_mask=mask, **how), plain)
        assert strategy == "auto" or model.base_model.mtp_statistics.accepted
    assert speculation_mode(model.base_model.model) is SpeculationMode.TREE


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_states_of_training_are_those_of_sdpa(architecture):
    model = with_flex(architecture)
    input_ids, *arguments = packed_batch()
    layout = training_layout(*arguments, k=3)
    with torch.no_grad():
        states = masked_states(model.base_model, input_ids, layout)
        model.get_base_model().set_attn_implementation("sdpa")
        expected = masked_states(model.base_model, input_ids, layout)
    wanted = layout.target_columns(arguments[0]) >= 0
    torch.testing.assert_close(states[0][-1][arguments[2] >= 0], expected[0][-1][arguments[2] >= 0])
    torch.testing.assert_close(states[1][-1][wanted], expected[1][-1][wanted])


def test_training_on_a_cpu_is_refused_by_torch():
    ids = prompt(14, 2)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        with_flex("llama").train()(input_ids=ids, labels=ids, mtp_objective=ObjectiveRequest())


def test_a_kernel_that_fails_is_not_used(monkeypatch):
    """Decoding is then as plain as it can be, and says so."""
    from transformers.integrations import flex_attention as host

    def no_kernel(query, key, *args, **kwargs):
        if query.shape[2] not in (1, key.shape[2]):
            raise RuntimeError("no kernel for this")
        return flex_attention.flex_attention(query, key, *args, **{k: v for k, v in kwargs.items() if k != "training"})

    model = with_flex("llama")
    plain = generate(model, prompt())
    monkeypatch.setattr(host, "compile_friendly_flex_attention", no_kernel)
    assert speculation_mode(model.base_model.model) is SpeculationMode.RECOMPUTE
    assert torch.equal(generate(model, prompt(), mtp=True), plain)
    with pytest.raises(NotImplementedError, match="speculation mode is 'recomputed chain'.*mtp_strategy='auto'"):
        generate(model, prompt(), mtp=True, mtp_strategy="quadratic")
