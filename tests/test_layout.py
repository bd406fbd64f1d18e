"""Where blocks hang and what their masks predict, against loops over single tokens."""

import pytest
import torch
from layouts import step_layout

from hf_mtp.layout.blocks import IGNORE, BlockLayout, segments, training_layout, weight_of_all_masks


def batch(seed: int, rows: int = 3, length: int = 13):
    """Random labels, positions and documents, with prompts, packing and padding: (labels, positions, segments)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.randint(low, high, (1,), generator=generator).item()  # noqa: E731
    labels = torch.randint(5, 97, (rows, length), generator=generator)
    positions = torch.zeros(rows, length, dtype=torch.long)
    attention = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        column = 0
        while column < length:  # documents of random length, each with a prompt
            end = min(length, column + draw(1, 8))
            positions[row, column:end] = torch.arange(end - column)
            labels[row, column : column + draw(0, 3)] = IGNORE
            column = end
        padding = draw(0, 4)
        labels[row, length - padding :] = IGNORE
        attention[row, length - padding :] = 0
    return labels, positions, segments(attention, positions)


def in_loss(labels, documents, row: int, column: int) -> bool:
    return labels[row, column] != IGNORE and documents[row, column] >= 0


def predicts(labels, documents, row: int, anchor: int, step: int) -> int:
    """The column that the `step`-th mask after `anchor` is to predict, or -100: one past the token it stands for."""
    target = anchor + step + 1
    if target >= labels.shape[1] or documents[row, target] != documents[row, anchor]:
        return IGNORE
    # A block counts if its first mask does: drafts are accepted in order.
    needed = (anchor + 1, anchor + 2, target)
    return target if all(in_loss(labels, documents, row, column) for column in needed) else IGNORE


def useful_anchors(labels, documents, row: int) -> list[int]:
    return [anchor for anchor in range(labels.shape[1]) if predicts(labels, documents, row, anchor, 1) != IGNORE]


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_targets(seed, k):
    labels, positions, documents = batch(seed)
    layout = training_layout(labels, positions, documents, k)
    columns = layout.target_columns(labels)
    assert columns.shape == layout.index_BM.shape
    for row, anchors in enumerate(layout.anchor_BM[:, ::k].tolist()):
        expected = [predicts(labels, documents, row, anchor, step) for anchor in anchors for step in range(1, k + 1)]
        assert columns[row].tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_every_useful_token_gets_one_block(seed):
    labels, positions, documents = batch(seed)
    layout = training_layout(labels, positions, documents, k=3)
    useful = [useful_anchors(labels, documents, row) for row in range(len(labels))]
    assert layout.masks // 3 == max(map(len, useful))
    for row, anchors in enumerate(layout.anchor_BM[:, ::3].tolist()):
        assert set(useful[row]) <= set(anchors)
        assert len(set(anchors)) == len(anchors)
        assert sorted(anchors) == anchors


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_of_the_useful_tokens(seed):
    labels, positions, documents = batch(seed, length=30)
    generator = torch.Generator().manual_seed(seed)
    seen = [set() for _ in labels]
    for _ in range(60):
        layout = training_layout(labels, positions, documents, 3, anchors_per_row=4, generator=generator)
        assert layout.anchor_BM.shape == (len(labels), 12)
        for row, anchors in enumerate(layout.anchor_BM[:, ::3].tolist()):
            assert set(anchors) <= set(useful_anchors(labels, documents, row))
            assert len(set(anchors)) == 4
            seen[row] |= set(anchors)
    assert seen == [set(useful_anchors(labels, documents, row)) for row in range(len(labels))]


def test_a_generator_makes_the_draw_repeatable():
    labels, positions, documents = batch(0, length=30)
    draws = [
        training_layout(labels, positions, documents, 3, 4, torch.Generator().manual_seed(7)).anchor_BM
        for _ in range(2)
    ]
    assert torch.equal(*draws)


def test_no_block_hangs_in_the_prompt_but_on_its_last_token():
    labels = torch.tensor([[IGNORE, IGNORE, IGNORE, 7, 8, 9, 10]])
    positions = torch.arange(7)[None]
    layout = training_layout(labels, positions, segments(None, positions), k=2)
    assert layout.anchor_BM[:, ::2].tolist() == [[2, 3, 4]]
    assert layout.target_columns(labels).tolist() == [[4, 5, 5, 6, 6, IGNORE]]


def test_no_mask_predicts_the_next_document():
    labels = torch.arange(10, 18)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    layout = training_layout(labels, positions, segments(None, positions), k=3)
    assert layout.anchor_BM[:, ::3].tolist() == [[0, 1, 4, 5]]
    assert layout.target_columns(labels).tolist() == [
        [2, 3, IGNORE, 3, IGNORE, IGNORE, 6, 7, IGNORE, 7, IGNORE, IGNORE]
    ]


@pytest.mark.parametrize("labels", [[[IGNORE] * 6], [[7, 8]], [[IGNORE, IGNORE, IGNORE, 8]], [[IGNORE, 7]], [[7]]])
def test_nothing_to_predict_gives_no_block(labels):
    labels = torch.tensor(labels)
    positions = torch.arange(labels.shape[1])[None]
    layout = training_layout(labels, positions, segments(None, positions), k=3)
    assert layout.anchor_BM.shape == (1, 0)
    assert layout.position_BN.shape == labels.shape


@pytest.mark.parametrize("seed", range(3))
def test_columns_of_a_layout(seed):
    labels, positions, documents = batch(seed)
    k, length = 3, labels.shape[1]
    layout = training_layout(labels, positions, documents, k)
    for row, anchors in enumerate(layout.anchor_BM[:, ::k].tolist()):
        for block, anchor in enumerate(anchors):
            for step in range(1, k + 1):
                mask = block * k + step - 1
                assert layout.step_BM[row, mask] == step
                assert layout.index_BM[row, mask] == step - 1
                assert layout.anchor_BM[row, mask] == anchor
                assert layout.stands_for_BM[row, mask] == anchor + step
                assert layout.position_BN[row, length + mask] == positions[row, anchor] + step
                assert layout.segment_BN[row, length + mask] == documents[row, anchor]
                assert layout.reach_BN[row, length + mask] == anchor
                assert layout.block_BN[row, length + mask] == anchor
    assert torch.equal(layout.position_BN[:, :length], positions)
    assert torch.equal(layout.segment_BN[:, :length], documents)
    assert torch.equal(layout.reach_BN[:, :length], torch.arange(length).expand_as(labels))
    assert (layout.block_BN[:, :length] == -1).all()


def test_documents_of_packed_and_padded_rows():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [3, 4, 5, 3, 0, 0]])
    attention = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1] * 6])
    assert segments(attention, positions).tolist() == [
        [0, 0, 0, 1, 1, 2],
        [0, 0, 0, 0, -1, -1],
        [0, 0, 0, 1, 2, 3],
    ]
    assert segments(None, positions)[1].tolist() == [0] * 6


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 50])
def test_parts_keep_every_block_in_order(blocks):
    labels, positions, documents = batch(1, length=20)
    layout = training_layout(labels, positions, documents, k=2)
    parts = layout.chunks(2 * blocks)
    assert all(part.masks <= 2 * blocks for part in parts)
    for name in ("anchor_BM", "step_BM"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(layout, name))
    assert all(part.position_BT is layout.position_BT for part in parts)


def plain_weight(labels, documents, k: int, decay: float) -> float:
    return sum(
        decay ** (step - 1)
        for row in range(len(labels))
        for anchor in useful_anchors(labels, documents, row)
        for step in range(1, k + 1)
        if predicts(labels, documents, row, anchor, step) != IGNORE
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_the_weight_of_all_masks(seed, decay):
    labels, positions, documents = batch(seed)
    weight = weight_of_all_masks(labels, documents, 3, decay)
    assert weight.item() == pytest.approx(plain_weight(labels, documents, 3, decay), rel=1e-6)


@pytest.mark.parametrize("same_in_all_rows", [False, True])
def test_a_sample_has_the_weight_of_the_whole_on_average(same_in_all_rows):
    labels, positions, documents = batch(2, length=30)
    generator, weights = torch.Generator().manual_seed(0), []
    for _ in range(400):
        layout = training_layout(labels, positions, documents, 3, 4, generator, same_in_all_rows)
        supervised = layout.target_columns(labels) != IGNORE
        weights.append((supervised * layout.weight_B[:, None]).sum().item())
    whole = plain_weight(labels, documents, 3, 1.0)
    assert sum(weights) / len(weights) == pytest.approx(whole, rel=0.03)
    assert max(weights) > 1.05 * whole  # by chance, each time another one


def test_decoding_layouts():
    # Four tokens after five cached ones: the pending token and three drafts.
    linear = step_layout(4, past=5, anchors=1, k=2)
    assert linear.position_BN.tolist() == [[5, 6, 7, 8, 9, 10]]
    quadratic = step_layout(4, past=5, anchors=4, k=2)
    assert quadratic.position_BN.tolist() == [[5, 6, 7, 8, 6, 7, 7, 8, 8, 9, 9, 10]]
    assert quadratic.anchor_BM.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    assert step_layout(4, past=5, anchors=4, k=0).position_BN.tolist() == [[5, 6, 7, 8]]


def test_a_block_without_masks_adds_no_column():
    layout = BlockLayout.of_blocks(
        torch.tensor([[1]]), torch.arange(3)[None], torch.zeros(1, 3, dtype=torch.long), k=0
    )
    assert layout.index_BM.shape == (1, 0)
    assert layout.block_BN.tolist() == [[-1, -1, -1]]
