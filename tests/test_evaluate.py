"""`evaluate`: what it counts, resuming, bad input, and the files that it writes."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, decoding_plainly, tiny_base, upgraded
from tiny_text import tiny_tokenizer, words
from tiny_training import taught
from tokenizers.normalizers import Replace

from hf_mtp import GatedLoraConfig
from hf_mtp.adapter.base_identity import base_fingerprint
from hf_mtp.data.ngram_counts import count_tokens
from hf_mtp.decoding.drafters import masks
from hf_mtp.evaluation import evaluate, load_results, write_card_section, write_report
from hf_mtp.evaluation.decoded import decode_rows
from hf_mtp.evaluation.run import adapter_fingerprint
from hf_mtp.evaluation.speed import runner as runner_module
from hf_mtp.evaluation.speed.results import Answer, Call, Results, Settings, Summary, summarize_calls
from hf_mtp.evaluation.speed.tables import table_page
from hf_mtp.evaluation.suites.suite import suite_of_rows

ROOT = Path(__file__).resolve().parents[1]
NEW_TOKENS = 12
METHODS = ["plain", "prompt lookup", "auto, k=3", "quadratic, k=1", "quadratic, k=3", "linear, k=3"]


def suite(rows: int = 4):
    """Prompts of two domains in turn."""
    return suite_of_rows(
        "words", [{"prompt": words(9, start=index), "domain": ("a", "b")[index % 2]} for index in range(rows)]
    )


@pytest.fixture(scope="module")
def model():
    return upgraded("llama", 3)


def run(model, prompts=None, **options) -> Results:
    options = {"max_new_tokens": NEW_TOKENS, **options}
    return evaluate(model, tiny_tokenizer(), prompts or suite(), **options)


@pytest.fixture(scope="module")
def results(model):
    return run(model)


def test_every_prompt_is_decoded_with_every_method(results):
    assert [method["name"] for method in results.settings.methods] == METHODS and results.complete
    assert set(results.domains) == {"a", "b", "all"} and set(results.warm_up) == set(METHODS)
    assert [(call.method, call.answers[0].prompt) for call in results.calls[:7]] == [
        *((method, "1") for method in METHODS),
        ("plain", "2"),
    ]
    assert len(results.calls) == 4 * len(METHODS)


def test_plain_decoding_has_one_token_per_pass_and_all_texts_are_its_own(results):
    for methods in results.domains.values():
        assert methods["plain"].tokens_per_pass == methods["plain"].speedup == methods["plain"].speedup_in_total == 1.0
        assert all(row.identical == row.prompts for row in methods.values())
    assert results.domains["all"]["plain"].prompts == 4
    assert results.domains["all"]["plain"].tokens == 4 * NEW_TOKENS


def test_the_counts_are_those_of_generate(model, results):
    prompt = tiny_tokenizer()(words(9))["input_ids"]
    options = {"mtp": True, "mtp_strategy": "quadratic", "mtp_k": 3}
    decoded = decode_rows(model, [prompt], NEW_TOKENS, **options)
    call = next(call for call in results.calls if call.method == "quadratic, k=3")
    counts = model.mtp_statistics
    assert call.forward_passes == call.row_passes == counts.forward_passes == decoded.forward_passes
    assert call.drafted_per_position == counts.drafted_per_position and sum(call.drafted_per_position) > 0
    assert call.answers[0].tokens == counts.tokens == NEW_TOKENS and call.answers[0].prompt_tokens == 9


def test_summaries_are_what_the_metrics_say(results):
    from hf_mtp.evaluation.metrics import load_metric

    calls = [call for call in results.calls if call.method == "quadratic, k=3"]
    row = results.domains["all"]["quadratic, k=3"]
    found = load_metric("tokens_per_pass").compute(
        tokens=[call.answers[0].tokens for call in calls], passes=[call.row_passes for call in calls]
    )
    assert found == {name: getattr(row, name) for name in found}
    found = load_metric("acceptance_per_position").compute(
        drafted=[call.drafted_per_position for call in calls], accepted=[call.accepted_per_position for call in calls]
    )
    assert found == {"acceptance_per_position": row.acceptance_per_position}


def test_what_training_says_of_the_same_answers_is_what_decoding_takes(model, results, monkeypatch):
    monkeypatch.setattr(masks, "SHORTLIST", VOCAB)  # else decoding looks for drafts among the likeliest tokens only
    found = run(taught(upgraded("llama", 3), NEW_TOKENS), strategies=["quadratic"], k=[3])
    decoded = {domain: methods["quadratic, k=3"].tokens_per_pass for domain, methods in found.domains.items()}
    assert found.simulated == decoded and max(decoded.values()) > 1
    assert results.simulated.keys() == results.domains.keys()
    assert run(model, suite(1), strategies=["linear"]).simulated == {}
    assert table_page(found).partition("## Simulated and decoded")[2].count("+0.0 %") == 3


def test_speeds_are_paired_and_their_spread_is_shown():
    def call(method: str, seconds: float) -> Call:
        return Call("a", method, seconds, 4, 4, [], [], [Answer("1", 3, 4, False, None, 0.0, None)])

    seconds = {"plain": [1.0, 2.0, 30.0], "quadratic, k=3": [0.5, 1.0, 20.0]}  # the machine slept in the third turn
    row = summarize_calls([call(method, one) for method in seconds for one in seconds[method]])["a"]["quadratic, k=3"]
    assert (row.speedup_low, row.speedup, row.speedup_high) == (1.75, 2.0, 2.0)
    assert row.speedup_in_total == pytest.approx(33 / 21.5)


def test_methods_take_turns_in_coming_first(model, monkeypatch):
    order = []

    def recorded(*args, **options):
        order.append(options.get("mtp_strategy", "lookup" if options else "plain"))
        return decode_rows(*args, **options)

    monkeypatch.setattr(runner_module, "decode_rows", recorded)
    run(model, suite(3), strategies=["linear"])
    assert order[3:] == ["plain", "lookup", "linear", "lookup", "linear", "plain", "linear", "plain", "lookup"]


def test_k_and_strategies_are_chosen(model):
    found = run(model, suite(1), strategies=["linear", "auto"], k=[2, 1])
    assert [method["name"] for method in found.settings.methods[2:]] == [
        "linear, k=1",
        "linear, k=2",
        "auto, k=1",
        "auto, k=2",
    ]
    assert set(found.domains) == {"a"}


def test_batches_count_a_pass_once_for_each_row_and_prompt_lookup_is_left_out(model):
    found = run(model, batch_size=2, strategies=["quadratic"], k=[3])
    assert "prompt lookup" in found.left_out and [*found.domains["all"]] == ["plain", "quadratic, k=3"]
    plain, call = found.calls[:2]
    assert [answer.prompt for answer in plain.answers] == ["1", "3"]  # of one domain
    assert plain.forward_passes == NEW_TOKENS and plain.row_passes == 2 * NEW_TOKENS
    assert call.forward_passes <= call.row_passes <= 2 * call.forward_passes
    assert found.domains["all"]["quadratic, k=3"].identical == 4


def test_prompt_lookup_is_left_out_also_if_only_later_batches_have_several_rows(model):
    rows = [{"prompt": words(9, start), "domain": "one" if not start else "two"} for start in range(3)]
    found = evaluate(model, tiny_tokenizer(), suite_of_rows("x", rows), batch_size=2, max_new_tokens=4)
    assert found.complete and "prompt lookup" in found.left_out
    assert {name: row["plain"].prompts for name, row in found.domains.items()} == {"one": 1, "two": 2, "all": 3}


def test_a_domain_stays_in_its_cell(model, tmp_path):
    rows = [{"prompt": words(9), "domain": "chat|code\nmore"}]
    write_report(evaluate(model, tiny_tokenizer(), suite_of_rows("x", rows), max_new_tokens=4), tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| chat\\|code more | " in table and "chat|code" not in table


def test_a_model_that_decodes_plainly_has_one_token_per_pass_by_auto():
    found = run(decoding_plainly(), strategies=["auto", "linear"])
    assert [*found.domains["all"]] == ["plain", "auto, k=3", "linear, k=3"] and "prompt lookup" in found.left_out
    auto = found.domains["all"]["auto, k=3"]
    assert auto.tokens_per_pass == 1 and auto.identical == 4 and auto.acceptance_per_position == []


def test_counts_of_an_earlier_call_are_not_those_of_plain_decoding(model):
    prompt = tiny_tokenizer()(words(9))["input_ids"]
    assert decode_rows(model, [prompt], NEW_TOKENS, mtp=True).is_mtp
    with model.disable_adapter(), pytest.warns(UserWarning, match="plain decoding"):
        decoded = decode_rows(model, [prompt], NEW_TOKENS, mtp=True)
    assert not decoded.is_mtp and decoded.steps == [1] * NEW_TOKENS and decoded.drafted_per_position == []


# ---------------------------------------------------------------- answers that end


def ending(token: int):
    model = upgraded(tiny_base("llama", eos_token_id=token, pad_token_id=0), 3)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = token, 0
    return model


def first_tokens(model) -> list[int]:
    return [
        decode_rows(model, [tiny_tokenizer()(words(9, start))["input_ids"]], NEW_TOKENS).rows[0] for start in range(2)
    ]


def test_the_end_token_ends_an_answer_and_counts(model):
    token = first_tokens(model)[0][5]
    place = first_tokens(model)[0].index(token)
    found = run(ending(token), suite(1))
    assert {(call.answers[0].tokens, call.answers[0].ended) for call in found.calls} == {(place + 1, True)}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_empty_answer_is_its_end_token(model, batch_size):
    prompts = suite_of_rows("same", [{"prompt": words(9)}, {"prompt": words(9)}])
    found = run(ending(first_tokens(model)[0][0]), prompts, batch_size=batch_size)
    for call in found.calls:
        assert [(answer.tokens, answer.ended, answer.repeated_4grams) for answer in call.answers] == [
            (1, True, 0.0)
        ] * batch_size
    assert all(row.tokens_per_pass == 1.0 for row in found.domains["all"].values())


# ---------------------------------------------------------------- resuming


def interrupted(model, output, monkeypatch, after: int) -> Results:
    """A run that Ctrl-C stops after some calls of `generate`, those of the warm-up not counted."""
    calls = 0

    def stop(*args, **options):
        nonlocal calls
        calls += 1
        if calls > after + len(METHODS):
            raise KeyboardInterrupt
        return decode_rows(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "decode_rows", stop)
        return run(model, output=output)


def prompts_decoded(model, output, monkeypatch) -> tuple[Results, int]:
    """Runs on, and counts the calls of `generate` without those of the warm-up."""
    calls = 0

    def count(*args, **options):
        nonlocal calls
        calls += 1
        return decode_rows(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "decode_rows", count)
        return run(model, output=output), calls - len(METHODS)


def test_an_interrupted_run_keeps_what_is_done_and_resumes(model, results, tmp_path, monkeypatch):
    partial = interrupted(model, tmp_path, monkeypatch, after=2 * len(METHODS) + 3)
    assert not partial.complete and load_results(tmp_path) == partial
    assert len(partial.calls) == 2 * len(METHODS)
    write_report(partial, tmp_path)
    assert "**Partial:**" in (tmp_path / "table.md").read_text()
    whole, decoded = prompts_decoded(model, tmp_path, monkeypatch)
    assert whole.complete and decoded == 2 * len(METHODS) and load_results(tmp_path) == whole
    assert whole.calls[: 2 * len(METHODS)] == partial.calls
    assert [call.answers for call in whole.calls] == [call.answers for call in results.calls]
    assert not (tmp_path / "calls.jsonl").exists() and whole.seconds > partial.seconds


def test_an_interrupt_before_the_first_prompt_is_over(model, tmp_path, monkeypatch):
    partial = interrupted(model, tmp_path, monkeypatch, after=0)
    assert not partial.complete and partial.domains == {} and load_results(tmp_path) == partial
    write_report(partial, tmp_path)
    assert "There are no results" in (tmp_path / "table.md").read_text()
    assert run(model, output=tmp_path).complete


def test_a_killed_run_resumes_from_its_last_whole_line(model, tmp_path, monkeypatch):
    interrupted(model, tmp_path, monkeypatch, after=2 * len(METHODS))
    lines = (tmp_path / "calls.jsonl").read_text()
    (tmp_path / "calls.jsonl").write_text(lines[:-40])
    (tmp_path / "results.json").unlink()
    whole, decoded = prompts_decoded(model, tmp_path, monkeypatch)
    assert whole.complete and decoded == 3 * len(METHODS)


def test_what_two_runs_wrote_into_one_folder_counts_once(model, results, tmp_path, monkeypatch):
    interrupted(model, tmp_path, monkeypatch, after=2 * len(METHODS))
    settings, *turns = (tmp_path / "calls.jsonl").read_text().splitlines()
    (tmp_path / "calls.jsonl").write_text("\n".join([settings, *reversed(turns), turns[0], ""]))
    whole, decoded = prompts_decoded(model, tmp_path, monkeypatch)
    assert whole.complete and decoded == 2 * len(METHODS)
    assert [call.answers for call in whole.calls] == [call.answers for call in results.calls]


@pytest.mark.parametrize("broken", ["without settings", "not JSON", "without calls"])
def test_broken_calls_are_named_and_left_as_they_are(broken, model, tmp_path, monkeypatch):
    interrupted(model, tmp_path, monkeypatch, after=2 * len(METHODS))
    settings, *turns = (tmp_path / "calls.jsonl").read_text().splitlines()
    lines = {"without settings": turns, "not JSON": [settings, "{"], "without calls": [settings, "{}"]}[broken]
    (tmp_path / "calls.jsonl").write_text("\n".join([*lines, ""]))
    with pytest.raises(ValueError, match=r"calls.jsonl does not have the finished calls of a run: .*delete this file"):
        run(model, output=tmp_path)
    assert (tmp_path / "calls.jsonl").read_text().splitlines() == lines


def test_a_finished_run_is_read_and_not_repeated(model, tmp_path, monkeypatch):
    whole = run(model, suite(2), output=tmp_path)
    monkeypatch.setattr(runner_module, "decode_rows", lambda *args, **options: 1 / 0)
    assert run(model, suite(2), output=tmp_path) == whole


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_the_folder_of_another_run_is_refused_and_left_as_it_is(state, model, tmp_path, monkeypatch):
    if state == "finished":
        run(model, output=tmp_path)
    else:
        interrupted(model, tmp_path, monkeypatch, after=len(METHODS))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="a different run: max_new_tokens was 12, but is now 13. Choose another"):
        run(model, output=tmp_path, max_new_tokens=13)
    with pytest.raises(ValueError, match="a different run: adapter was"):
        run(upgraded("llama", 3, seed=5), output=tmp_path)
    with pytest.raises(ValueError, match="a different run: suite was"):
        run(model, suite(3), output=tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


# ---------------------------------------------------------------- bad input


def test_prompts_longer_than_the_context_are_left_out_and_said_so(model):
    prompts = suite_of_rows("long", [{"prompt": words(130)}, {"prompt": words(116)}, {"prompt": words(117)}])
    found = run(model, prompts)
    assert found.left_out == {
        "1": "130 prompt tokens and 12 new tokens exceed the context of 128.",
        "3": "117 prompt tokens and 12 new tokens exceed the context of 128.",
    }
    assert found.domains["all"]["plain"].prompts == 1 and found.settings.suite["prompts"] == 3
    with pytest.raises(ValueError, match="None of the 1 prompts can be answered.*exceed the context of 128.*shorter"):
        run(model, suite_of_rows("long", [{"prompt": words(130)}]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strategies": ["cubic"]}, "one or more of 'auto', 'quadratic', 'linear', but got"),
        ({"strategies": []}, "one or more"),
        ({"k": [0, 3]}, r"between 1 and 3, the adapter's k, but got \[0\]"),
        ({"k": [4]}, "between 1 and 3"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, but got 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"limit": 0}, "must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message, model):
    with pytest.raises(ValueError, match=message):
        run(model, **options)


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="has no adapter of hf_mtp"):
        run(tiny_base("llama"))


def test_the_fingerprint_is_of_the_adapters_weights_and_not_of_their_dtype():
    prints = [adapter_fingerprint(made) for made in (upgraded(), upgraded().double(), upgraded(seed=9))]
    assert prints[0] == prints[1] != prints[2]
    assert prints[0] == adapter_fingerprint(upgraded(tiny_base("llama", seed=3)))


def test_the_fingerprint_covers_the_n_gram_table():
    model = upgraded()
    prints = [adapter_fingerprint(model)]
    for text in ([5, 6, 7], [5, 6, 8]):
        model.active_peft_config.ngrams = count_tokens([text] * 2)
        prints.append(adapter_fingerprint(model))
    assert len(set(prints)) == 3


def test_the_fingerprint_is_that_of_one_adapter():
    model = upgraded(k=3)
    before = adapter_fingerprint(model)
    model.add_adapter("default2", GatedLoraConfig(k=2, r=2))
    assert adapter_fingerprint(model) == before


def test_the_fingerprint_of_the_base_is_of_its_weights_alone():
    bases = [tiny_base("llama"), tiny_base("llama"), tiny_base("llama", seed=3)]
    prints = [base_fingerprint(upgraded(base, seed=seed)) for seed, base in enumerate(bases)]
    assert prints[0] == prints[1] != prints[2]
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    stacked = upgraded(get_peft_model(tiny_base("llama"), lora))
    assert base_fingerprint(stacked) not in prints


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("change", ["base", "tokens"])
def test_results_of_another_base_or_of_other_tokens_are_not_returned(change, tmp_path):
    """A base of the same name may have been trained further, and a chat template may have changed."""
    run(upgraded("llama", 3), suite(1), output=tmp_path, strategies=["linear"])
    base = tiny_base("llama")
    prompts, tokenizer = suite(1), tiny_tokenizer()
    if change == "base":
        torch.nn.init.normal_(base.model.layers[1].mlp.up_proj.weight)
    else:
        tokenizer.backend_tokenizer.normalizer = Replace("w6", "w7")
    with pytest.raises(ValueError, match=f"results of a different run: .*'{change}'"):
        evaluate(
            upgraded(base, 3), tokenizer, prompts, max_new_tokens=NEW_TOKENS, output=tmp_path, strategies=["linear"]
        )


def test_the_schema_is_checked(results, tmp_path):
    results.save(tmp_path)
    assert load_results(tmp_path) == load_results(tmp_path / "results.json") == results
    content = json.loads((tmp_path / "results.json").read_text())
    for change, message in (
        ({"schema": "hf_mtp.evaluation/0"}, "has the schema 'hf_mtp.evaluation/0'"),
        ({"complete": None}, "does not follow the schema.*Results has other fields: complete"),
        ({"calls": [{"method": "plain"}]}, "does not follow the schema"),
        ({"more": 1}, "other fields: more"),
    ):
        changed = {name: value for name, value in {**content, **change}.items() if value is not None}
        (tmp_path / "bad.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load_results(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_results(tmp_path / "bad.json")


@pytest.mark.parametrize("kind", [Results, Settings, Summary, Call, Answer])
def test_the_page_documents_every_field_of_the_schema(kind):
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(kind):
        assert f"`{field.name}`" in page, f"{kind.__name__}.{field.name}"


def test_the_report_has_the_papers_table_the_curves_and_how_it_was_measured(results, tmp_path):
    files = write_report(results, tmp_path)
    assert [path.name for path in files] == ["table.md", "curves.png", "curves.svg"]
    assert all(path.stat().st_size > 1000 for path in files)
    table = (tmp_path / "table.md").read_text()
    row = results.domains["a"]
    assert f"| a | {' | '.join(f'{row[method].tokens_per_pass:.2f}' for method in METHODS[1:])} |" in table
    for part in ("bonus token", "k=3, r=4", "float32", "batch 1", " thread", results.settings.adapter["fingerprint"]):
        assert part in table
    assert "4 of 4 prompts" in table and "Left out" not in table


def test_a_busy_machine_and_what_was_left_out_are_shown(results, tmp_path):
    write_report(dataclasses.replace(results, load_average=3.5, left_out={"7": "Too long."}), tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "**Busy machine:**" in table and "load average 3.5" in table and "Left out: 7. Too long." in table
    write_report(dataclasses.replace(results, load_average=0.1), tmp_path)
    assert "Busy" not in (tmp_path / "table.md").read_text()


def test_without_matplotlib_there_is_the_table(results, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mtp.evaluation.speed.report.can_draw", lambda: False)
    assert [path.name for path in write_report(results, tmp_path)] == ["table.md"]


def test_the_card_gets_one_section_that_is_replaced(model, results, tmp_path):
    model.save_pretrained(tmp_path)
    card = write_card_section(results, tmp_path)
    first = card.read_text()
    assert write_card_section(results, tmp_path).read_text() == first
    assert first.count("## Evaluation") == 1 and "| a |" in first
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["tokens_per_pass"]) == 3 and "Not measured" not in first


def test_a_card_written_by_hand_keeps_its_text(model, results, tmp_path):
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text("# Mine\n\nMy words.\n")
    write_card_section(results, tmp_path)
    card.write_text(card.read_text() + "\n## After\n")
    write_card_section(results, tmp_path)
    text = card.read_text()
    places = [text.index(part) for part in ("My words.", "## Evaluation", "## After")]
    assert all(one < other for one, other in pairwise(places)) and text.count("## Evaluation") == 1


def test_a_card_whose_section_has_lost_its_end_loses_nothing_else(model, results, tmp_path):
    model.save_pretrained(tmp_path)
    card = write_card_section(results, tmp_path)
    open_card = card.read_text().replace("<!-- end of hf_mtp evaluation -->", "") + "My words.\n"
    card.write_text(open_card)
    with pytest.raises(ValueError, match="but not `<!-- end of hf_mtp evaluation -->` after it"):
        write_card_section(results, tmp_path)
    assert card.read_text() == open_card


def test_a_card_is_refused_for_partial_results_and_without_an_adapter(results, tmp_path):
    with pytest.raises(ValueError, match="was interrupted"):
        write_card_section(dataclasses.replace(results, complete=False), tmp_path)
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        write_card_section(results, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_process_changes(model):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run(model, suite(1))
    assert torch.equal(torch.rand(1), expected)


def test_the_committed_results_follow_the_schema():
    results = load_results(ROOT / "docs" / "results" / "evaluation.json")
    assert results.complete and results.domains == summarize_calls(results.calls)
