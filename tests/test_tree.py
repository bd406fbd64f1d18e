"""Trees of drafts: alternatives are verified in one pass, and the output is that of plain decoding."""

import itertools

import pytest
import torch
from oracle import Oracle, sampled_text
from test_batch import alone, padded
from tiny_models import CACHE, CONFIGS, VOCAB, WITHOUT_BRANCHES, generate, prompt, tiny_base, upgraded
from transformers import LogitsProcessor, LogitsProcessorList

from hf_mtp.decoding import loop
from hf_mtp.decoding.batch import Batch
from hf_mtp.decoding.drafters.base import Drafts
from hf_mtp.decoding.schedule.costs import PassCosts
from hf_mtp.layout.attention import CachedColumns, allowed_attention
from hf_mtp.layout.blocks import decoding_layout
from hf_mtp.layout.mask_plan import landing_probability, no_masks, whole_blocks
from hf_mtp.layout.tree import accepted_path, ancestors, depths

FREE = PassCosts([(1, 1.0), (99, 1.001)], [(1, 1.0), (99, 1.001)])
# Pending token, two alternatives, two behind the first, one behind the second, one behind that.
PARENTS = [0, 0, 1, 1, 2, 5]
SMALL, NEW = 5, 24
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")  # torch's grouped product knows no float64
TREES = [name for name in CONFIGS if name not in WITHOUT_BRANCHES]


class TreeOracle(Oracle):
    """Drafts chains whose tokens are wrong where the output index is not divisible by 3; siblings are right there."""

    def __init__(self, monkeypatch, sequences):
        super().__init__(monkeypatch, sequences, lambda index: index % 3 == 0)

    def propose(self, outcome, counts):
        drafts = super().propose(outcome, counts)
        siblings = torch.full((*drafts.token_BK.shape, 2), VOCAB - 1)
        for index, (row, count) in enumerate(zip(outcome.sequences, counts, strict=True)):
            for place in range(count):
                known = row.prompt + row.new_tokens + place
                token = self.sequences[row.row][known].item() if known < self.sequences.shape[1] else 0
                wrong = (token + 2) % VOCAB
                right = token if not self.right(known) else (token + 3) % VOCAB
                siblings[index, place] = torch.tensor([right, wrong] if known % 2 else [wrong, right])
        return Drafts(drafts.token_BK, drafts.confidence_BK, sibling_BKC=siblings)


@pytest.fixture
def free_columns(monkeypatch):
    """Passes cost the same whatever their columns, so that `auto` verifies alternatives. Returns its trees."""
    monkeypatch.setattr(loop, "measure_costs", lambda *args, **options: FREE)
    trees, before = [], Batch.set_drafts

    def set_drafts(batch, pending_B, drafts, origins):
        if drafts.parent_BK is not None:
            trees.append(drafts.parent_BK)
        before(batch, pending_B, drafts, origins)

    monkeypatch.setattr(Batch, "set_drafts", set_drafts)
    return trees


def small_model(architecture: str = "llama", seed: int = 0, k: int = 3):
    base = tiny_base(architecture, torch.float64, vocab_size=SMALL, seed=seed)
    return upgraded(base, k=k, dtype=torch.float64, seed=seed).double()


# ---------------------------------------------------------------- functions of tensors


def test_ancestors_and_depths():
    parent_BK = torch.tensor([PARENTS, [0, 1, 2, 3, 4, 5]])
    found = ancestors(parent_BK)
    paths = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 2, 5, 6]]
    assert [row.nonzero()[:, 0].tolist() for row in found[0]] == paths
    assert torch.equal(found[1], torch.ones(7, 7).tril().bool())
    assert depths(found).tolist() == [[0, 1, 1, 2, 2, 2, 3], [*range(7)]]


def test_accepted_paths_by_enumeration():
    ancestor_BRR = ancestors(torch.tensor([PARENTS]))
    for right in itertools.product([False, True], repeat=6):
        if right[0] and right[1] or right[2] and right[3]:
            continue  # of two alternatives, one is right
        column, path = 0, [0]
        while column is not None:
            children = (c for c, parent in enumerate(PARENTS, 1) if parent == column and right[c - 1])
            column = next(children, None)
            path += [] if column is None else [column]
        path_BR, accepted_B = accepted_path(torch.tensor([right]), ancestor_BRR)
        assert path_BR[0, : len(path)].tolist() == path
        assert accepted_B.tolist() == [len(path) - 1]


def test_landing_probabilities():
    chain = torch.tensor([[0.5, 0.8, 0.3]])
    as_tree = landing_probability(chain, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(as_tree, landing_probability(chain))
    torch.testing.assert_close(as_tree, torch.tensor([[0.5, 0.1, 0.28, 0.12]]))
    tree = landing_probability(torch.tensor([[0.5, 0.25, 0.5]]), torch.tensor([[0, 0, 2]]))
    torch.testing.assert_close(tree, torch.tensor([[0.25, 0.5, 0.125, 0.125]]))


@pytest.mark.parametrize("past", [0, 4])
def test_who_attends_to_whom(past):
    parent_BK = torch.tensor([PARENTS])
    plan = whole_blocks(torch.tensor([6]), 6, 2, linear=False)
    layout = decoding_layout(past + torch.arange(7)[None], plan, parent_BK=parent_BK)
    columns = 7 + 14
    cached = CachedColumns(torch.tensor([0]), torch.tensor([past]), past + columns) if past else None
    allowed = allowed_attention(layout, cached)[0]
    seen = [row.nonzero()[:, 0].tolist() for row in ancestors(parent_BK)[0]]
    for column in range(7):
        assert allowed[column].nonzero()[:, 0].tolist() == [*range(past), *(past + c for c in seen[column])]
        first, second = 7 + 2 * column, 8 + 2 * column
        text = [*range(past), *(past + c for c in seen[column])]
        assert allowed[first].nonzero()[:, 0].tolist() == [*text, past + first]
        assert allowed[second].nonzero()[:, 0].tolist() == [*text, past + first, past + second]
    assert (layout.position_BN[0, :7] - past).tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert (layout.position_BN[0, 7::2] - past).tolist() == [1, 2, 2, 3, 3, 3, 4]
    assert not layout.is_causal
    assert decoding_layout(torch.arange(7)[None], no_masks(1, 7, 2, torch.device("cpu"))).is_causal


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("architecture", TREES)
def test_greedy_decoding_is_exact(architecture, free_columns, monkeypatch):
    dtype = torch.float32 if architecture in EXPERTS else torch.float64
    base = tiny_base(architecture, dtype)
    expected = generate(base, prompt(), NEW)
    model = upgraded(base, k=3).to(dtype)
    TreeOracle(monkeypatch, expected)
    output = generate(model, prompt(), NEW, mtp=True)
    assert torch.equal(output, expected)
    assert free_columns
    assert model.mtp_statistics.forward_passes <= 10  # three tokens and more in each; chains would need 17


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_the_adapters_own_alternatives(architecture, free_columns):
    accepted = 0
    for seed in range(3):
        model = small_model(architecture, seed)
        output = generate(model, prompt() % SMALL, NEW, mtp=True)
        assert torch.equal(output, generate(model, prompt() % SMALL, NEW))
        accepted += model.mtp_statistics.accepted
    assert len(free_columns) > 2
    assert accepted > 10


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"repetition_penalty": 1.4}], ids=str)
def test_sampled_texts_are_those_of_one_token_at_a_time(options, free_columns):
    model = small_model(k=4)
    texts = [
        sampled_text(model.get_base_model(), prompt(9, 3)[row : row + 1] % SMALL, 5, row, NEW, **options)
        for row in range(3)
    ]
    output = model.generate(
        prompt(9, 3) % SMALL,
        do_sample=True,
        max_new_tokens=NEW,
        generator=torch.Generator().manual_seed(5),
        mtp=True,
        **options,
    )
    assert output[:, 9:].tolist() == texts
    assert free_columns


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_batches(architecture, cache, free_columns):
    model, inputs = small_model(architecture, seed=3), padded()
    options = {"do_sample": False, "max_new_tokens": NEW, "mtp": True, "cache_implementation": cache}
    output = model.generate(**inputs, **options)
    for row in range(4):
        input_ids = alone(inputs, row)
        expected = generate(model, input_ids, NEW, attention_mask=torch.ones_like(input_ids))[0, -NEW:]
        assert output[row, -NEW:].tolist() == expected.tolist()
    assert free_columns


class BansTheLastToken(LogitsProcessor):
    """A processor of the user's own, so that rows advance in step."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 4},
        {"eos_token_id": 2, "min_new_tokens": 9},
        {"logits_processor": LogitsProcessorList([BansTheLastToken()])},
        {"logits_processor": LogitsProcessorList([BansTheLastToken()]), "eos_token_id": 2},
    ],
    ids=["by_row", "end", "in_step", "in_step_and_end"],
)
def test_processors_and_ends(options, free_columns):
    model, inputs = small_model(seed=3), padded((9, 9, 9, 9)) | {"do_sample": False, "max_new_tokens": NEW}
    for _ in range(2):
        output = model.generate(**inputs, **options, mtp=True)
        assert torch.equal(output, model.generate(**inputs, **options))
    assert free_columns


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_returned_states_and_cache(architecture, free_columns, monkeypatch):
    base = tiny_base(architecture, torch.float64)
    base.set_attn_implementation("eager")
    model = upgraded(base, k=3, dtype=torch.float64).double()
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
    plain = generate(model, prompt(), NEW, return_dict_in_generate=True, **wanted)
    TreeOracle(monkeypatch, plain.sequences)
    output = generate(model, prompt(), NEW, return_dict_in_generate=True, mtp=True, **wanted)
    assert torch.equal(output.sequences, plain.sequences)
    for name in ("scores", "logits", "hidden_states", "attentions"):
        for found, expected in zip(output[name], plain[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-5)
    for found, expected in zip(output[CACHE].layers, plain[CACHE].layers, strict=True):
        torch.testing.assert_close(found.keys, expected.keys, rtol=1e-3, atol=5e-5)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-3, atol=5e-5)
    assert free_columns


# ---------------------------------------------------------------- where it is on


def test_fixed_strategies_verify_chains(free_columns):
    for strategy in ("quadratic", "linear"):
        generate(small_model(), prompt() % SMALL, NEW, mtp=True, mtp_strategy=strategy)
    assert free_columns == []


def test_siblings_are_the_next_likeliest_candidates():
    model = small_model(k=3)
    pending_B, hidden_BKD = torch.tensor([1, 2]), torch.randn(2, 3, 32, dtype=torch.float64)
    chain = model.base_model.draft(pending_B, hidden_BKD)
    drafts = model.base_model.draft(pending_B, hidden_BKD, siblings=2)
    assert torch.equal(drafts.token_BK, chain.token_BK)
    candidate_BKC = torch.cat([drafts.token_BK[:, :, None], drafts.sibling_BKC], dim=2)
    assert candidate_BKC.shape == (2, 3, 3)
    assert all(len(set(row)) == 3 for block in candidate_BKC.tolist() for row in block)
    everything = model.base_model.draft(pending_B, hidden_BKD, siblings=99).sibling_BKC
    assert everything.shape == (2, 3, SMALL - 1)  # no more than there are tokens
    assert torch.equal(everything[:, :, :2], drafts.sibling_BKC)
