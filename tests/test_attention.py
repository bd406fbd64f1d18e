"""The attention rule, against a loop over pairs of tokens; and that models obey it."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from layouts import cached_columns, masked_states, step_layout
from test_layout import batch
from tiny_models import CONFIGS, WITHOUT_BRANCHES, adapter_parameters, checkpoint_layers, tiny_base, upgraded

from hf_mtp.cache.rollback import RollbackCache
from hf_mtp.layout.attention import (
    AttentionKind,
    CachedColumns,
    additive,
    allowed_attention,
    attention_kinds,
    attention_masks,
)
from hf_mtp.layout.blocks import decoding_layout, segments, training_layout
from hf_mtp.layout.mask_plan import choose_masks
from hf_mtp.passes.decoding_pass import DecodingPass

KINDS = [
    AttentionKind(),
    AttentionKind("sliding_attention", window=1),
    AttentionKind("sliding_attention", window=4),
    AttentionKind("chunked_attention", chunk=3),
]


def may_attend(layout, past: int, kind: AttentionKind, row: int, query: int, key: int) -> bool:
    """The rule for one query column and one key, of which the first `past` are cached regular tokens."""
    key_position = key if key < past else layout.position_BN[row, key - past].item()
    query_position = layout.position_BN[row, query].item()
    if kind.window is not None and query_position - key_position >= kind.window:
        return False
    if kind.chunk is not None and query_position // kind.chunk != key_position // kind.chunk:
        return False
    if key < past:
        return True
    key -= past
    if key == query:
        return True  # also padding, which nobody reads
    if layout.segment_BN[row, key] != layout.segment_BN[row, query] or layout.segment_BN[row, key] < 0:
        return False
    regular = layout.position_BT.shape[1]
    if key < regular:  # a mask reads what its anchor reads
        anchor = query if query < regular else layout.anchor_BM[row, query - regular]
        return key <= anchor
    return layout.block_BN[row, query] == layout.block_BN[row, key] and key < query


def by_loop(layout, past: int, kind: AttentionKind) -> torch.Tensor:
    rows, columns = layout.position_BN.shape
    return torch.tensor(
        [
            [
                [bool(may_attend(layout, past, kind, row, query, key)) for key in range(past + columns)]
                for query in range(columns)
            ]
            for row in range(rows)
        ]
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_training_attention(seed, kind):
    labels, positions, documents = batch(seed, rows=2, length=11)
    layout = training_layout(labels, positions, documents, k=2)
    expected = by_loop(layout, 0, kind)
    assert torch.equal(allowed_attention(layout, kind=kind), expected)
    masks = layout.index_BM.shape[1]
    assert torch.equal(allowed_attention(layout, kind=kind, queries=masks), expected[:, -masks:])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("anchors", [1, 4])
@pytest.mark.parametrize("past", [0, 6])
def test_decoding_attention(past, anchors, kind):
    layout = step_layout(4, past, anchors, k=3)
    assert torch.equal(allowed_attention(layout, cached_columns(layout, past), kind), by_loop(layout, past, kind))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_of_a_batch_see_their_own_cache_only(kind):
    # Rows with 2, 5 and 4 cached columns, of which 0, 3 and 1 are padding, in a storage of 14 columns.
    start, length = torch.tensor([0, 3, 1]), torch.tensor([2, 5, 4])
    value = torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(0)).sort(dim=2, descending=True).values
    layout = decoding_layout((length - start)[:, None] + torch.arange(3), choose_masks(value, 4))
    allowed = allowed_attention(layout, CachedColumns(start, length, 14), kind)
    for row in range(3):
        alone = decoding_layout((length - start)[row] + torch.arange(3)[None], choose_masks(value[row : row + 1], 4))
        cached, own = (length - start)[row].item(), slice(length[row], length[row] + 7)
        expected = by_loop(alone, cached, kind)[0]
        assert torch.equal(allowed[row, :, start[row] : length[row]], expected[:, :cached])
        assert torch.equal(allowed[row, :, own], expected[:, cached:])
        assert not allowed[row, :, : start[row]].any()
        assert not allowed[row, :, own.stop :].any()


def test_the_rule_by_eye():
    # a b | m1 m2 after a | m1 m2 after b
    layout = step_layout(2, past=0, anchors=2, k=2)
    assert allowed_attention(layout)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_mask(dtype):
    layout = step_layout(3, past=2, anchors=3, k=2)
    mask = attention_masks(layout, [AttentionKind()], partial(additive, dtype=dtype), cached_columns(layout, 2))
    assert mask.dtype == dtype
    assert mask.shape == (1, 1, 9, 11)
    assert torch.equal(mask[:, 0] == 0, allowed_attention(layout, cached_columns(layout, 2)))
    assert mask.min() == torch.finfo(dtype).min


def test_one_mask_until_the_window_is_exceeded_and_then_one_per_kind():
    form = partial(additive, dtype=torch.float32)
    kinds = [AttentionKind(), AttentionKind("sliding_attention", window=10)]
    for past, expected in ((1, torch.Tensor), (2, dict)):
        layout = step_layout(3, past, anchors=3, k=2)
        cached = cached_columns(layout, past)
        assert isinstance(attention_masks(layout, kinds, form, cached), expected)
    masks = attention_masks(layout, kinds, form, cached)
    assert masks.keys() == {"full_attention", "sliding_attention"}
    assert torch.equal(masks["sliding_attention"][:, 0] == 0, allowed_attention(layout, cached, kinds[1]))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {("full_attention", None, None)}),
        ({"sliding_window": 7}, {("sliding_attention", 7, None)}),
        ({"sliding_window": 7, "layer_types": ["full_attention"] * 2}, {("full_attention", None, None)}),
        (
            {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
            {("full_attention", None, None), ("sliding_attention", 7, None)},
        ),
        (
            {"attention_chunk_size": 4, "layer_types": ["chunked_attention"]},
            {("chunked_attention", None, 4)},
        ),
    ],
)
def test_attention_kinds_of_a_config(config, expected):
    kinds = attention_kinds(SimpleNamespace(**config))
    assert {(kind.name, kind.window, kind.chunk) for kind in kinds} == expected


# ---------------------------------------------------------------- what models compute under the rule


def packed_batch():
    """Two rows of two documents each, the second row padded: (input_ids, labels, layout arguments)."""
    labels, positions, documents = batch(4, rows=2, length=15)
    return labels.clamp(min=5), labels, positions, documents


@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name not in WITHOUT_BRANCHES])
def test_masks_in_one_pass_are_computed_as_sequences_of_their_own(architecture):
    """The block of each anchor, among all others, against its document up to the anchor followed by the block."""
    dtype = torch.float32 if "experts" in str(CONFIGS[architecture]) else torch.float64
    model = upgraded(architecture, k=3, dtype=dtype)
    positions = torch.tensor([[*range(9), *range(8)]])  # two documents, both beyond the window of 7
    input_ids = torch.randint(5, 97, positions.shape)
    layout = training_layout(input_ids, positions, segments(None, positions), k=3)
    with torch.no_grad():
        _, masks = masked_states(model.base_model, input_ids, layout)
    for block, anchor in enumerate(layout.anchor_BM[0, ::3].tolist()):
        document = input_ids[:, 9 * (anchor >= 9) : anchor + 1]
        alone = step_layout(document.shape[1], past=0, anchors=1, k=3)
        step, cache = DecodingPass(model.base_model), RollbackCache(torch.zeros(1, dtype=torch.long))
        with torch.no_grad():
            expected = step(document, alone, cache, logits_rows=1)
        trained = layout.target_columns(input_ids)[0, 3 * block : 3 * block + 3] >= 0  # others may differ
        found_BMD = masks[-1][:, 3 * block : 3 * block + 3]
        torch.testing.assert_close(found_BMD[:, trained], expected.mask_BMD[:, trained], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masks", [6, 24, 96])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "mistral"])
def test_two_passes_give_the_values_and_gradients_of_one(architecture, masks):
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if architecture == "gpt2" else {}
    model = upgraded(tiny_base(architecture, torch.float64, **dropout), k=3).double().train()
    input_ids, *arguments = packed_batch()
    layout = training_layout(*arguments, k=3)
    weights = torch.randn(model.config.num_hidden_layers + 1, *layout.index_BM.shape, 32, dtype=torch.float64)
    weights *= (layout.target_columns(arguments[0]) >= 0)[..., None]  # masks that nobody trains may differ
    results = []
    for checkpointing in (True, False):
        checkpoint_layers(model, on=checkpointing)  # layers under checkpointing take no cache: one pass
        model.zero_grad()
        regular, states = masked_states(model.base_model, input_ids, layout, True, masks)
        assert [state.shape for state in states] == [weight.shape for weight in weights]
        (torch.stack(states) * weights).sum().backward()
        real = arguments[2] >= 0
        results.append(
            [torch.stack(regular)[:, real], torch.stack(states) * (weights != 0)]
            + [p.grad for name, p in adapter_parameters(model).items() if "sampler" not in name]
        )
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_regular_states_have_no_gradient_to_pay_for():
    model = upgraded("llama", k=3).train()
    input_ids, *arguments = packed_batch()
    regular, masks = masked_states(model.base_model, input_ids, training_layout(*arguments, k=3))
    assert not regular[-1].requires_grad
    assert masks[-1].requires_grad


@pytest.mark.parametrize(
    "architecture, checkpointing", [("gpt2", False), ("gpt2", True), ("opt", False), ("opt", True), ("bloom", False)]
)
def test_regular_states_in_training_are_the_bases_without_its_dropout(architecture, checkpointing):
    """Masks would learn from states that the base does not have when it verifies their drafts."""
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1} if architecture == "bloom" else {}
    model = upgraded(tiny_base(architecture, **dropout), k=3).train()
    checkpoint_layers(model, on=checkpointing)
    input_ids = torch.randint(5, 97, (2, 12))
    positions = torch.arange(12).expand(2, -1)
    layout = training_layout(input_ids, positions, segments(None, positions), k=3)
    in_training = masked_states(model.base_model, input_ids, layout, all_layers=True)
    again = masked_states(model.base_model, input_ids, layout, all_layers=True)
    with torch.no_grad():
        in_evaluation = masked_states(model.eval().base_model, input_ids, layout, all_layers=True)
    for state, expected in zip(in_training[0], in_evaluation[0], strict=True):
        torch.testing.assert_close(state, expected)
    assert not torch.equal(in_training[1][-1], again[1][-1])  # masks are trained with dropout


def test_regular_states_are_the_bases():
    base, model = tiny_base("llama"), upgraded("llama", k=3)
    input_ids = torch.randint(5, 97, (2, 12))
    positions = torch.arange(12).expand(2, -1)
    layout = training_layout(input_ids, positions, segments(None, positions), k=3)
    with torch.no_grad():
        regular, _ = masked_states(model.base_model, input_ids, layout, all_layers=True)
        expected = base(input_ids, output_hidden_states=True).hidden_states
    for state, state_of_base in zip(regular, expected, strict=True):
        torch.testing.assert_close(state, state_of_base)


def test_the_layout_of_the_first_pass_has_no_masks():
    layout = training_layout(*packed_batch()[1:], k=3)
    assert allowed_attention(layout.without_masks()).shape == (2, 15, 15)
