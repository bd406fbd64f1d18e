"""Grouped-query attention without a copy of the cache for each query head."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_base, upgraded
from transformers.integrations.sdpa_attention import repeat_kv

from hf_mtp.cache import shared_heads
from hf_mtp.cache.shared_heads import RepeatedHeads, SharedHeads

B, G, REPEATS, N, S, D = 2, 2, 3, 5, 600, 8


def states() -> torch.Tensor:
    return torch.randn(B, G, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("heads_of_mask", [1, G * REPEATS])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_attention_is_that_over_repeated_heads(heads_of_mask, kind, monkeypatch):
    keys, values, queries = states(), states() + 1, torch.randn(B, G * REPEATS, N, D, dtype=torch.float64)
    mask = torch.rand(B, heads_of_mask, N, S) > 0.3
    mask = mask if kind == "bool" else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    shared = repeat_kv(SharedHeads.of(keys), REPEATS), repeat_kv(SharedHeads.of(values), REPEATS)
    assert all(type(each) is RepeatedHeads and each.shape == (B, G * REPEATS, S, D) for each in shared)
    expected = F.scaled_dot_product_attention(
        queries, repeat_kv(keys, REPEATS), repeat_kv(values, REPEATS), attn_mask=mask
    )
    with monkeypatch.context() as patch:
        patch.setattr(RepeatedHeads, "plain", lambda self: pytest.fail("copied"))
        found = F.scaled_dot_product_attention(queries, *shared, attn_mask=mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    # Without a mask, transformers passes no repeated heads; if somebody does, they are copied.
    assert torch.equal(
        F.scaled_dot_product_attention(queries, *shared),
        F.scaled_dot_product_attention(queries, repeat_kv(keys, REPEATS), repeat_kv(values, REPEATS)),
    )


@pytest.mark.parametrize(
    "use",
    [
        lambda keys: keys + 1,
        lambda keys: torch.cat([keys, keys]),
        lambda keys: keys[:, 1],
        lambda keys: keys[:, :, None],
        lambda keys: keys[:, :, None] * 2,
        lambda keys: keys[:, :, None, :, :].sum(),
        lambda keys: torch.cat([keys[:, :, None, :, :]] * 2),
        lambda keys: keys[:, :, None, :, :].expand(-1, -1, 3, -1, -1),
        lambda keys: keys[:, :, None, :, :].expand(B, G, 3, S, D).flatten(1, 2),
        lambda keys: keys[:, :, None, :, :].expand(B, G, 3, S, D).reshape(B, 3 * G * S, D),
        lambda keys: repeat_kv(keys, 3).transpose(2, 3),
        lambda keys: torch.matmul(repeat_kv(keys, 3), repeat_kv(keys, 3).transpose(2, 3)),
        lambda keys: repeat_kv(keys, 3)[:, :, 1:],
        lambda keys: repeat_kv(keys, 3).to(torch.float32),
        lambda keys: keys.repeat_interleave(3, dim=1),
    ],
)
def test_everything_else_is_done_with_plain_tensors(use):
    expected, found = use(states()), use(SharedHeads.of(states()))
    found = found if isinstance(found, torch.Tensor) else found.plain()
    assert torch.equal(torch.Tensor.clone(found), expected) and found.shape == expected.shape


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt_oss", "phi3", "mistral"])
@pytest.mark.parametrize("padding", [0, 3])
def test_decoding_shares_heads(architecture, padding, monkeypatch):
    options = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = upgraded(tiny_base(architecture, torch.float64, **options), k=3, dtype=torch.float64)
    if model.config._attn_implementation != "sdpa":
        pytest.skip("no sdpa")
    monkeypatch.setattr(shared_heads, "LEAST_COLUMNS", 0)
    calls, attention = [], shared_heads._attention

    def counted(*args, **options):
        calls.append(1)
        return attention(*args, **options)

    monkeypatch.setattr(shared_heads, "_attention", counted)
    ids = torch.randint(5, 20, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**options, mtp=True, mtp_strategy="quadratic"), model.generate(**options))
    assert calls
