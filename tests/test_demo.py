"""The race of the demo: fair turns, the texts of `generate`, drafts that are shown as they were decided."""

import re
import socket
import threading
import time

import pytest
import torch
from tiny_models import prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from transformers import AutoModelForCausalLM

pytest.importorskip("greenlet", reason="needs hf_mtp[demo]")

from hf_mtp.decoding.streaming import DraftStreamer, DraftToken  # noqa: E402
from hf_mtp.demo.drawing import draw_race, result_of  # noqa: E402
from hf_mtp.demo.lane import END, Draft, Lane, LaneState, Pass, accepted_drafts  # noqa: E402
from hf_mtp.demo.race import Frame, RaceTrack  # noqa: E402
from hf_mtp.demo.settings import RaceSettings  # noqa: E402
from hf_mtp.demo.turns import Turns  # noqa: E402

WORDS = "w6 w9 w12"


@pytest.fixture(scope="module")
def track() -> RaceTrack:
    return RaceTrack(upgraded(tiny_base("llama", max_position_embeddings=256), 3), tiny_tokenizer())


def last(track: RaceTrack, **settings) -> Frame:
    """The last frame of a race."""
    settings = {"prompt": WORDS, "max_new_tokens": 20, "k": 3, **settings}
    return [*track.run(RaceSettings(**settings), 0.001)][-1]


# ---------------------------------------------------------------- turns


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("costs", [(1.0, 1.0), (1.0, 2.5), (3.0, 1.0)])
def test_the_side_whose_clock_shows_less_goes_on(costs, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("hf_mtp.demo.turns.time", clock)
    turns, log = Turns(2), []

    def decode(number: int) -> None:
        for _ in range(12):
            log.append((number, list(turns.seconds)))
            clock.now += costs[number]
            turns.stop_clock(number)
            clock.now += 100.0  # on no clock
            turns.end()

    turns.run([lambda: decode(0), lambda: decode(1)])
    assert turns.seconds == pytest.approx([12 * cost for cost in costs])
    assert all(seconds[number] == min(seconds) for number, seconds in log[:12])
    assert sorted(number for number, _ in log) == [0] * 12 + [1] * 12


def test_a_pause_is_on_no_clock():
    turns, shown = Turns(1, pause=0.05), []

    def decode() -> None:
        shown.append(turns.stop_clock(0))
        turns.end()

    start = time.perf_counter()
    turns.run([decode])
    assert time.perf_counter() - start >= 0.05
    assert turns.seconds == shown


def test_cancel_ends_all_decoders_wherever_they_are():
    turns, ended = Turns(3, pause=60), []

    def decode(number: int) -> None:
        try:
            turns.stop_clock(number)
            turns.end()
        finally:
            ended.append(number)

    def first() -> None:
        threading.Timer(0.1, turns.cancel).start()  # in the pause after this turn
        decode(0)

    turns.run([first, lambda: decode(1), lambda: decode(2)])
    assert ended == [0]  # the others have not begun


def test_an_error_of_one_decoder_ends_the_others():
    turns, ended = Turns(2), []

    def decode() -> None:
        try:
            turns.stop_clock(0)
            turns.end()
        finally:
            ended.append(torch.is_grad_enabled())

    def fail() -> None:
        raise MemoryError("too long")

    with pytest.raises(MemoryError, match="too long"):
        turns.run([decode, fail])
    assert ended == [True]


# ---------------------------------------------------------------- drafts


def test_accepted_drafts_follow_the_tree():
    #  0 -> 1 (5) -> 2 (6) -> 4 (8)
    #    -> 3 (7) -> 5 (8)
    drafts = [DraftToken(5, 0), DraftToken(6, 1), DraftToken(7, 0), DraftToken(8, 2), DraftToken(8, 3)]
    assert accepted_drafts(drafts, [7, 8, 9]) == [3, 5]
    assert accepted_drafts(drafts, [5, 6, 8, 1]) == [1, 2, 4]
    assert accepted_drafts(drafts, [8]) == accepted_drafts([], [8]) == []


class DraftRecorder(DraftStreamer):
    """Follows the drafts of each row and counts."""

    def __init__(self):
        self.rows: list[list[int]] = []
        self.drafted = self.accepted = self.forward_passes = 0
        self.waiting: list[list[DraftToken]] = []

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 2:
            self.rows, self.new = [[] for _ in value], [[] for _ in value]
        else:
            for row, token in zip(self.new, value.tolist(), strict=True):
                row.append(token)

    def end_pass(self) -> None:
        for drafts, tokens in zip(self.waiting, self.new, strict=False):
            self.drafted += len(drafts)
            self.accepted += len(accepted_drafts(drafts, tokens))
        for row, tokens in zip(self.rows, self.new, strict=True):
            row += tokens
            tokens.clear()

    def put_drafts(self, drafts: list[list[DraftToken]], forward_passes: int) -> None:
        self.waiting, self.forward_passes = drafts, forward_passes

    def end(self) -> None:
        assert not any(self.waiting)


@pytest.mark.parametrize("strategy", ["quadratic", "linear", "auto"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_streamer_gets_all_drafts_that_are_verified(base, strategy):
    model, recorder = upgraded(base, 3), DraftRecorder()
    options = {"max_new_tokens": 25, "do_sample": False, "mtp": True, "mtp_strategy": strategy}
    output = model.generate(prompt(), streamer=recorder, **options)
    counts = model.mtp_statistics
    assert recorder.rows == output[:, 11:].tolist()
    assert (recorder.drafted, recorder.accepted) == (counts.drafted, counts.accepted)
    assert recorder.forward_passes == counts.forward_passes
    if strategy == "quadratic":
        assert counts.drafted > 20


def test_each_row_of_a_batch_has_its_own_drafts():
    model, recorder, shown = upgraded("llama", 3), DraftRecorder(), []
    recorder.put_drafts = lambda drafts, passes: shown.append(drafts)
    options = {"max_new_tokens": 12, "do_sample": False, "mtp": True, "mtp_strategy": "quadratic"}
    model.generate(prompt(rows=3), streamer=recorder, **options)
    assert all(len(drafts) == 3 for drafts in shown) and shown[-1] == [[], [], []]
    assert [len(row) for row in shown[0]] == [3, 3, 3] and len({tuple(row) for row in shown[0]}) == 3


# ---------------------------------------------------------------- races


def test_a_generation_config_that_narrows_sampling_changes_neither_side(track, monkeypatch):
    before = last(track, temperature=1.0, seed=7)
    for name, value in {"top_k": 3, "min_p": 0.9, "top_h": 0.3, "epsilon_cutoff": 0.02, "eta_cutoff": 0.1}.items():
        for model in (track.model, track.base):
            monkeypatch.setattr(model.generation_config, name, value)
    after = last(track, temperature=1.0, seed=7)
    assert before.plain.ids == before.mtp.ids == after.plain.ids == after.mtp.ids


@pytest.mark.parametrize("strategy", ["auto", "quadratic", "linear"])
@pytest.mark.parametrize("temperature", [0, 1])  # as a browser sends them
def test_both_sides_say_the_text_of_generate(track, temperature, strategy):
    frame = last(track, strategy=strategy, temperature=temperature, seed=7)
    assert frame.is_finished and frame.is_same_text and frame.same_tokens == 20
    options = {"do_sample": temperature > 0, "mtp": True, "mtp_strategy": strategy, "max_new_tokens": 20}
    if temperature:
        options |= {"temperature": 1.0, "top_k": 0, "generator": torch.Generator().manual_seed(7)}
    ids = track.prompt_ids(WORDS)
    expected = track.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert list(frame.mtp.ids) == expected[0, ids.shape[1] :].tolist()


def test_seeds_give_different_texts(track):
    assert last(track, temperature=1.0, seed=1).plain.ids != last(track, temperature=1.0, seed=2).plain.ids


def test_a_lane_counts_what_generate_counts(track):
    frame, counts = last(track, strategy="quadratic"), track.model.mtp_statistics
    assert (frame.mtp.drafted, frame.mtp.accepted) == (counts.drafted, counts.accepted)
    assert frame.mtp.forward_passes == counts.forward_passes == len(frame.mtp.passes)
    assert frame.mtp.drafted > 20
    assert (frame.plain.forward_passes, frame.plain.drafted) == (20, 0)
    text = track.tokenizer.decode(frame.mtp.ids, skip_special_tokens=True)
    shown = "".join(token for each in frame.mtp.passes for token in each.tokens)
    assert shown.replace(END, "").strip() == text.strip()
    assert all(len(each.tokens) == 1 + each.accepted for each in frame.mtp.passes[:-1])


def test_one_thread_computes_both_sides_and_all_before(monkeypatch):
    model, threads, forward = upgraded(tiny_base("llama"), 3), set(), torch.nn.Linear.forward

    def recorded(self, *args):
        threads.add(threading.current_thread().name)
        return forward(self, *args)

    monkeypatch.setattr(torch.nn.Linear, "forward", recorded)
    last(RaceTrack(model, tiny_tokenizer()), max_new_tokens=4)
    assert threads == {"hf_mtp race_0"}


def test_closing_a_race_cancels_it_and_the_next_one_runs(track):
    race = track.run(RaceSettings(WORDS, 200, 3), 0.001)
    next(race)
    assert track.is_racing
    race.close()
    assert not track.is_racing
    assert last(track).is_same_text


def test_who_stops_a_race_does_not_wait_for_that_of_the_next_visitor(track):
    mine, next_one = (track.run(RaceSettings(WORDS, 200, 3, slow=True), 0.001) for _ in range(2))
    next(mine)
    waiter = threading.Thread(target=track.wait_until_ended, args=(120,), daemon=True)
    visitor = threading.Thread(target=next, args=(next_one,))  # waits for its turn
    for thread in (visitor, waiter):
        thread.start()
        time.sleep(0.2)
    mine.close()
    for thread in (visitor, waiter):
        thread.join(20)
    try:
        assert track.is_racing and not waiter.is_alive()
        track.wait_until_ended(0.01)  # for the one that runs now
        assert track.is_racing
    finally:
        next_one.close()
    track.wait_until_ended()
    assert not track.is_racing


def test_an_interrupted_call_leaves_the_costs_that_it_measured():
    model = upgraded("llama", 3)

    class Interrupt(DraftRecorder):
        def put_drafts(self, drafts, forward_passes):
            if forward_passes > 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt(), streamer=Interrupt(), max_new_tokens=25, do_sample=False, mtp=True)
    (schedule,) = model.base_model.schedules._known.values()
    assert schedule.costs is not None


def test_what_goes_wrong_on_one_side_ends_the_race(track, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Lane, "finish", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        last(track)
    assert not track.is_racing


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt": "  "}, "The prompt is empty"),
        ({"prompt": "w6 " * 300}, r"The prompt has 302 tokens .* at most 256 in total. .* by 66 in total"),
        ({"k": 4}, r"\(k\) must be a number from 1 to 3, but got 4"),
        ({"seed": None}, "The seed must be a number from 0 up, but got None"),
        ({"temperature": -1}, "The temperature must be a number from 0 to 2.0, but got -1"),
        ({"strategy": "fast"}, "must be one of auto, quadratic, linear, but got 'fast'"),
    ],
)
def test_wrong_settings_are_refused(track, settings, message):
    with pytest.raises(ValueError, match=message):
        last(track, **settings)


def test_a_model_that_decodes_plainly_has_nothing_to_race(track, monkeypatch):
    monkeypatch.setattr(track, "_known", set())
    generate = track.model.generate
    monkeypatch.setattr(track.model, "generate", lambda mtp=None, **rest: generate(**_without_mtp(rest)))
    with pytest.raises(ValueError, match="nothing to race"):
        last(track)


def _without_mtp(options: dict) -> dict:
    return {name: value for name, value in options.items() if not name.startswith("mtp_")}


# ---------------------------------------------------------------- drawing

DECIDED = Pass((" the", " cat"), (Draft(" the", 1, True), Draft(" a", 1), Draft(" <dog>\n", 2)))


def state(**fields) -> LaneState:
    given = {"passes": (Pass(("I",)), DECIDED), "forward_passes": 2, "ids": (1, 2, 3), "seconds": 1.5}
    return LaneState(**{**given, **fields})


def test_drafts_are_shown_kept_or_struck():
    waiting = state(drafts=(Draft(" sat", 1), Draft(" ran", 1), Draft(" on", 2)))
    html = draw_race(Frame(LaneState(), waiting), 10)
    text = html.partition("race-text mtp")[2]
    assert '<span class="kept"> the</span>' in text and '<span class="own"> cat</span>' in text
    assert re.findall(r"<del>(.*?)</del>", text) == [" a", " &lt;dog&gt;⏎"]
    assert re.findall(r'class="draft[^"]*">(.*?)<', text) == [" sat", " ran", " on"]
    assert "<dd>2.0</dd>" in html and "<dd>1.50</dd>" in html and "<dd>1 of 3</dd>" in html and "<dog>" not in html


def test_a_finished_text_has_no_struck_drafts_but_a_list_of_passes():
    html = draw_race(Frame(state(is_finished=True), state(is_finished=True)), 10)
    text, _, passes = html.partition("<details")
    assert "<del>" not in text.partition("race-texts")[2] and "<del> a</del>" in passes and "All 2 passes" in passes


def test_the_result_is_said_in_words():
    plain, mtp = state(is_finished=True, seconds=3.0), state(is_finished=True, seconds=1.5)
    assert "2.00 times as fast" in result_of(Frame(plain, mtp), "float32", False, True)
    assert "slower, at 0.50 times the speed" in result_of(Frame(mtp, plain), "float32", False, True)
    assert "identical, token for token" in result_of(Frame(plain, mtp), "float32", False, True)
    other = Frame(plain, state(is_finished=True, ids=(1, 2, 9)))
    assert "diverge after 2 tokens" in result_of(other, "bfloat16", False, True)
    assert "Tick “Bit for bit”" in result_of(other, "bfloat16", False, True)
    assert "Tick" not in result_of(other, "bfloat16", False, False)
    assert "please report it" in result_of(other, "bfloat16", True, True)


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny base, with a tokenizer, and of its adapter."""
    folder = tmp_path_factory.mktemp("demo")
    tiny_base("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    upgraded(AutoModelForCausalLM.from_pretrained(folder / "base"), 3).save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def test_the_page_shows_a_race_and_an_error(track):
    page = pytest.importorskip("hf_mtp.demo.page", reason="needs hf_mtp[demo]", exc_type=ImportError)
    assert page.make_page(track, "tiny", "here").fns
    shown = list(page._frames(track, RaceSettings(WORDS, 12, 3)))
    assert shown[0][2] == page.gr.update(interactive=False) and shown[-1][2] == page.gr.update(interactive=True)
    assert shown[-1][0].count("race-done") == 2 and "token for token" in shown[-1][1]
    emptied = page._settings_of((WORDS, 12.0, None, "auto", 0, 0, False, False))
    assert emptied.max_new_tokens == 12 and "(k) must be a number" in [*page._frames(track, emptied)][-1][1]
    assert "Error: The prompt is empty" in [*page._frames(track, RaceSettings("", 12, 3))][-1][1]


def test_demo_refuses_a_used_port_and_what_is_no_adapter(folders):
    app = pytest.importorskip("hf_mtp.demo.app", reason="needs hf_mtp[demo]", exc_type=ImportError)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"Cannot listen on port {port} of 127.0.0.1: .* --port"):
            app.Demo(app.DemoSettings(folders[1], port=port))
    with pytest.raises(ValueError, match="is a base model"):
        app.Demo(app.DemoSettings(folders[0], port=0))
