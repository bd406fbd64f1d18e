"""`probe`: ranks against a computation one guess at a time, the untouched base, bad input, and the files it writes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer, words

from hf_mtp.evaluation import load_probe, probe, write_probe
from hf_mtp.evaluation.decoded import decode_rows
from hf_mtp.evaluation.ranks import probe as probing
from hf_mtp.evaluation.ranks.figures import heatmap, histogram
from hf_mtp.evaluation.ranks.placeholders import placeholders_of
from hf_mtp.evaluation.ranks.probe import AHEAD, MASKS, SAMPLER, SAMPLER_ALONE
from hf_mtp.evaluation.ranks.results import (
    ProbedText,
    ProbeResults,
    ProbeSettings,
    RankSummary,
    summaries_of,
    summarize_ranks,
    token_ranks,
)
from hf_mtp.evaluation.suites.suite import suite_of_rows

ROOT = Path(__file__).resolve().parents[1]
K, NEW_TOKENS = 3, 10
PAD, EOS = 0, 1
PLACEHOLDERS = ["last token repeated", "end of sequence", "padding", "mean embedding"]


def suite(rows: int = 2):
    """Prompts of two domains in turn."""
    return suite_of_rows(
        "words", [{"prompt": words(9, start=index), "domain": ("a", "b")[index % 2]} for index in range(rows)]
    )


def run(model, prompts=None, **options) -> ProbeResults:
    return probe(model, tiny_tokenizer(), prompts or suite(), **{"max_new_tokens": NEW_TOKENS, **options})


@pytest.fixture(scope="module")
def model():
    return upgraded("llama", K)


@pytest.fixture(scope="module")
def results(model):
    return run(model)


# ---------------------------------------------------------------- ranks, one guess at a time


def place(logits_V: torch.Tensor, token: int) -> int:
    """The rank of a token, from a sorted list."""
    return 1 + sorted(range(VOCAB), key=lambda other: (-logits_V[other].item(), other)).index(token)


def guesses(text: list[int], answer: int, guess) -> list[list[int]]:
    """Ranks by block, from `guess(text up to the anchor, tokens after it, position)`, the logits of one guess."""
    blocks = []
    for anchor in range(len(text) - answer - 1, len(text) - 2):
        positions = range(1, min(K, len(text) - anchor - 2) + 1)
        true = text[anchor + 1 :]
        blocks.append([place(guess(text[: anchor + 1], true, i), true[i]) for i in positions])
    return blocks


@torch.no_grad()
def after_placeholders(base, token: int | None):
    """Logits of a base without an adapter after some placeholders."""

    def guess(before: list[int], true: list[int], position: int) -> torch.Tensor:
        placeholder = before[-1] if token is None else token
        return base(torch.tensor([before + [placeholder] * position])).logits[0, -1]

    return guess


def after_mean_embeddings(base):
    table = base.get_input_embeddings().weight

    def guess(before: list[int], true: list[int], position: int) -> torch.Tensor:
        embedded = torch.cat([table[before], table.mean(dim=0).expand(position, -1)])
        return base(inputs_embeds=embedded[None]).logits[0, -1]

    return guess


def mask_states(model, before: list[int], count: int) -> torch.Tensor:
    ids = torch.tensor([before + [VOCAB + index for index in range(count)]])
    return model(ids, output_hidden_states=True).hidden_states[-1][0, -count:]


def after_masks(model):
    return lambda before, true, position: model.base_model.unembedding()(mask_states(model, before, position))[-1]


def after_sampler(model, own_drafts: bool):
    tuner = model.base_model
    blocks, table = tuner.sampler_head().blocks, tuner.model.get_input_embeddings().weight

    def guess(before: list[int], true: list[int], position: int) -> torch.Tensor:
        states, last = mask_states(model, before, position), true[0]
        for number, state in enumerate(states):
            logits = tuner.unembedding()(
                blocks(torch.cat([table[last], state])) + state * tuner.sampler_head().residual
            )
            if own_drafts:
                listed = tuner.unembedding()(state).topk(32).indices
                last = listed[logits[listed].argmax()].item()
            elif number + 1 < position:
                last = true[number + 1]
        return logits

    return guess


@torch.no_grad()
def brute_force(model, base, source: str, text: list[int], answer: int) -> list[list[int]]:
    guess = {
        "last token repeated": after_placeholders(base, None),
        "end of sequence": after_placeholders(base, EOS),
        "padding": after_placeholders(base, PAD),
        "mean embedding": after_mean_embeddings(base),
        MASKS: after_masks(model),
        SAMPLER: after_sampler(model, own_drafts=False),
        SAMPLER_ALONE: after_sampler(model, own_drafts=True),
    }[source]
    return guesses(text, answer, guess)


@pytest.mark.parametrize("source", [*PLACEHOLDERS, MASKS, SAMPLER, SAMPLER_ALONE])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "bloom"])  # the last one allows no tree
def test_ranks_are_those_of_one_guess_at_a_time(architecture, source):
    model, tokenizer = upgraded(architecture, K), tiny_tokenizer()
    (text,) = run(model, suite(1)).texts
    prompt = tokenizer(words(9))["input_ids"]
    assert text.ids == decode_rows(model, [prompt], NEW_TOKENS).rows[0] and text.prompt_tokens == len(prompt)
    expected = brute_force(model, tiny_base(architecture), source, prompt + text.ids, len(text.ids))
    assert text.ranks[source] == expected
    assert len(expected) == NEW_TOKENS - 1 and expected[-1] and len(set(sum(expected, []))) > 3


def test_chunks_of_blocks_change_nothing(results, monkeypatch):
    monkeypatch.setattr(probing, "MASKS_PER_CHUNK", 2 * K)
    assert run(upgraded("llama", K)).texts == results.texts


def test_equal_logits_are_ordered_by_id_as_argmax_does():
    logits_RV = torch.tensor([[1.0, 5, 5, 0], [1, 5, 5, 0], [2, 2, 2, 2], [-torch.inf, 0, 0, 0], [torch.nan] * 4])
    ranks = token_ranks(lambda hidden: hidden, logits_RV, torch.tensor([1, 2, 3, 0, 1]))
    assert ranks.tolist() == [1, 2, 4, 4, 5] and logits_RV[0].argmax() == 1


@pytest.mark.parametrize("rows", [0, 1, 700])
def test_ranks_do_not_depend_on_chunks(rows):
    generator = torch.Generator().manual_seed(0)
    logits_RV, token_R = torch.randn(rows, VOCAB, generator=generator), torch.arange(rows) % VOCAB
    found = token_ranks(lambda hidden: hidden, logits_RV, token_R).tolist()
    assert found == [place(logits, token) for logits, token in zip(logits_RV, token_R.tolist(), strict=True)]


# ---------------------------------------------------------------- the untouched base


def test_an_adapter_changes_its_masks_and_no_placeholder(results):
    other = run(upgraded("llama", K, seed=9))
    for mine, its in zip(results.texts, other.texts, strict=True):
        assert mine.ids == its.ids and mine.ranks[MASKS] != its.ranks[MASKS]
        assert all(mine.ranks[source] == its.ranks[source] for source in PLACEHOLDERS)


def test_a_base_alone_has_placeholders_and_stays_as_it_is(results):
    base = tiny_base("llama")
    base.get_output_embeddings().weight.requires_grad_(False)
    before = [(name, parameter.requires_grad) for name, parameter in base.named_parameters()]
    logits, modules = base(prompt()).logits, [name for name, _ in base.named_modules()]
    found = run(base)
    assert found.settings.adapter is None and found.settings.k == AHEAD
    assert list(found.summaries) == found.placeholders == PLACEHOLDERS
    for alone, with_adapter in zip(found.texts, results.texts, strict=True):
        for source in PLACEHOLDERS:
            assert [block[:K] for block in alone.ranks[source]] == with_adapter.ranks[source]
    assert torch.equal(base(prompt()).logits, logits)
    assert [(name, parameter.requires_grad) for name, parameter in base.named_parameters()] == before
    assert [name for name, _ in base.named_modules()] == modules and not hasattr(base, "peft_config")
    assert run(base).texts == found.texts


def test_without_a_sampler_head_there_are_masks():
    assert list(run(upgraded("llama", K, sampler=False), suite(1)).summaries) == [*PLACEHOLDERS, MASKS]


def test_kinds_of_placeholder_that_a_tokenizer_does_not_have_are_left_out():
    base, tokenizer = tiny_base("llama"), tiny_tokenizer()
    found, left_out = placeholders_of(base, tokenizer)
    assert [one.name for one in found] == PLACEHOLDERS and [one.token for one in found[:3]] == [None, EOS, PAD]
    assert left_out == {"newline": "The tokenizer has no such token."}
    tokenizer.pad_token = tokenizer.eos_token
    assert placeholders_of(base, tokenizer)[1]["padding"] == "It is the same token as end of sequence."
    tokenizer.eos_token = tokenizer.pad_token = None
    found, left_out = placeholders_of(base, tokenizer)
    assert [one.name for one in found] == [PLACEHOLDERS[0], PLACEHOLDERS[3]] and len(left_out) == 3


def test_nothing_of_the_process_changes(model):
    for probed in (model, tiny_base("llama")):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        run(probed, suite(1))
        assert torch.equal(torch.rand(1), expected)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"), ({"limit": 0}, "`limit`.*must be at least 1")],
)
def test_arguments_out_of_range_are_refused(options, message, model):
    with pytest.raises(ValueError, match=message):
        run(model, **options)


def test_an_adapter_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="has no adapter of hf_mtp"):
        run(get_peft_model(tiny_base("llama"), LoraConfig()))


def test_prompts_without_room_for_the_last_positions_are_left_out(model):
    most = 128 - NEW_TOKENS - K
    found = run(model, suite_of_rows("long", [{"prompt": words(most)}, {"prompt": words(most + 1)}]))
    assert [text.prompt for text in found.texts] == ["1"] and "exceed the context of 128" in found.left_out["2"]


def test_an_answer_of_one_token_is_left_out(model, results):
    model = upgraded("llama", K)
    model.generation_config.eos_token_id = results.texts[0].ids[0]
    found = run(model)
    assert [text.prompt for text in found.texts] == ["2"] and "has only one token" in found.left_out["1"]
    with pytest.raises(ValueError, match="No answer has two tokens.*larger `max_new_tokens` than 1"):
        run(model, max_new_tokens=1)


def test_the_folder_of_another_run_is_refused_and_left_as_it_is(model, tmp_path):
    first = run(model, output=tmp_path)
    before = (tmp_path / "probe.json").read_bytes()
    with pytest.raises(ValueError, match="a different run: max_new_tokens was 10, but is now 11. Choose another"):
        run(model, output=tmp_path, max_new_tokens=11)
    with pytest.raises(ValueError, match="a different run: adapter was"):
        run(tiny_base("llama"), output=tmp_path)
    assert (tmp_path / "probe.json").read_bytes() == before
    assert run(model, output=tmp_path).texts == first.texts


# ---------------------------------------------------------------- summaries and files


def test_summaries_are_by_source_and_position():
    texts = [
        ProbedText("1", "a", 5, [7, 8, 9], {"masks": [[1, 11], [10]]}),
        ProbedText("2", "b", 5, [7, 8], {"masks": [[201]]}),
    ]
    assert summaries_of(texts) == {
        "masks": {
            "1": RankSummary(3, 10.0, 1 / 3, 2 / 3, 2 / 3),
            "2": RankSummary(1, 11.0, 0.0, 0.0, 1.0),
            "all": RankSummary(4, 10.5, 1 / 4, 1 / 2, 3 / 4),
        }
    }


def test_the_results_have_every_rank(results):
    assert results.summaries == summaries_of(results.texts)
    assert results.placeholders == PLACEHOLDERS and results.left_out.keys() == {"newline"}
    for source, rows in results.summaries.items():
        ranks = results.ranks(source)
        assert len(ranks) == rows["all"].tokens == sum(rows[str(i)].tokens for i in range(1, K + 1))
        assert rows["all"] == summarize_ranks(ranks) and 1 <= min(ranks) and max(ranks) <= VOCAB


def test_the_schema_is_checked(results, tmp_path):
    results.save(tmp_path)
    assert load_probe(tmp_path) == load_probe(tmp_path / "probe.json") == results
    content = json.loads((tmp_path / "probe.json").read_text())
    for change, message in (
        ({"schema": "hf_mtp.evaluation/1"}, "has the schema 'hf_mtp.evaluation/1'"),
        ({"seconds": None}, "does not follow the schema.*ProbeResults has other fields: seconds"),
        ({"texts": [{"prompt": "1"}]}, "does not follow the schema.*ProbedText has other fields"),
        ({"more": 1}, "other fields: more"),
    ):
        changed = {name: value for name, value in {**content, **change}.items() if value is not None}
        (tmp_path / "bad.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load_probe(tmp_path / "bad.json")


@pytest.mark.parametrize("kind", [ProbeResults, ProbeSettings, RankSummary, ProbedText])
def test_the_page_documents_every_field_of_the_schema(kind):
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").partition("## probe.json")[2]
    for field in dataclasses.fields(kind):
        assert f"`{field.name}`" in page, f"{kind.__name__}.{field.name}"


def test_the_report_has_tables_and_figures(results, tmp_path):
    files = write_probe(results, tmp_path)
    assert [path.name for path in files] == [
        "probe.md",
        "heatmap.png",
        "heatmap.svg",
        "histogram.png",
        "histogram.svg",
    ]
    assert all(path.stat().st_size > 1000 for path in files)
    page, row = (tmp_path / "probe.md").read_text(), results.summaries[MASKS]
    tops = " | ".join(f"{share:.1%}" for share in (row["all"].top_1, row["all"].top_10, row["all"].top_200))
    assert f"| {MASKS} | {tops} | {row['all'].median:g} |" in page
    assert f"| {MASKS} | {' | '.join(f'{row[str(i)].top_10:.0%}' for i in range(1, K + 1))} |" in page
    for part in ("2 of 2 prompts", " thread", results.settings.adapter["fingerprint"], "Left out: newline."):
        assert part in page
    best = max(PLACEHOLDERS, key=lambda source: results.summaries[source]["all"].top_200)
    assert f"at the best placeholder (“{best}”), {row['all'].top_10:.0%} in the top 10 at “{MASKS}”" in page


def test_the_heatmap_has_the_medians_and_the_histogram_the_shares(results):
    shown = [text.get_text() for text in heatmap(results).axes[0].texts]
    assert shown == [f"{rows[str(i)].median:.0f}" for rows in results.summaries.values() for i in range(1, K + 1)]
    sources = {line.get_label(): line for line in histogram(results).axes[0].lines}
    for source, rows in results.summaries.items():
        ranks, shares = sources[source].get_data()
        assert max(share for rank, share in zip(ranks, shares, strict=True) if rank <= 10) == rows["all"].top_10


def test_without_matplotlib_there_is_the_table(results, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mtp.evaluation.ranks.report.can_draw", lambda: False)
    assert [path.name for path in write_probe(results, tmp_path)] == ["probe.md"]


def test_the_committed_results_follow_the_schema():
    results = load_probe(ROOT / "docs" / "results" / "probe.json")
    assert results.summaries == summaries_of(results.texts)
