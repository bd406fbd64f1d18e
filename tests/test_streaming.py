"""Streamers get what plain decoding gives them: a token of every row at a time, as soon as all rows have it."""

from threading import Thread

import pytest
import torch
from oracle import RIGHT, Oracle
from test_batch import SMALL, padded
from tiny_models import generate, prompt, tiny_base, upgraded
from tiny_text import tiny_tokenizer
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from hf_mtp.cli.session import PiecePrinter

STRATEGIES = ("quadratic", "linear", "auto")


class Recorder(BaseStreamer):
    """Keeps what it gets."""

    def __init__(self):
        self.got, self.ends = [], 0

    def put(self, value):
        assert not self.ends
        self.got.append(value.tolist())

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"eos_token_id": 4}, {"repetition_penalty": 1.5, "eos_token_id": 4}],
    ids=["whole", "rows_end", "in_order"],
)
@pytest.mark.parametrize("rows", [1, 4])
def test_puts_are_those_of_plain_decoding(rows, options, strategy):
    model = upgraded(tiny_base("llama", vocab_size=SMALL, seed=3), k=3)
    inputs = padded((9, 5, 8, 7)[:rows]) | {"max_new_tokens": 25, "do_sample": False} | options
    plain, fast = Recorder(), Recorder()
    model.generate(**inputs, streamer=plain)
    model.generate(**inputs, streamer=fast, mtp=True, mtp_strategy=strategy)
    assert fast.got == plain.got
    assert (fast.ends, plain.ends) == (1, 1)


@pytest.mark.parametrize("right", RIGHT)
@pytest.mark.parametrize("strategy", ["quadratic", "linear"])
def test_every_token_once_and_in_order(strategy, right, monkeypatch):
    model, streamer = upgraded("llama", k=3), Recorder()
    expected = generate(model, prompt())
    Oracle(monkeypatch, expected, RIGHT[right])
    generate(model, prompt(), mtp=True, mtp_strategy=strategy, streamer=streamer)
    assert streamer.got[0] == expected[:, :11].tolist()
    assert [token for put in streamer.got[1:] for token in put] == expected[0, 11:].tolist()


def test_a_token_is_sent_when_every_row_has_it(monkeypatch):
    """From the seventh token on, all drafts are wrong."""
    model, inputs = upgraded("llama", k=3), {"input_ids": prompt(rows=2), "max_new_tokens": 12, "do_sample": False}
    expected, passes = model.generate(**inputs), []
    model.generate(**inputs, mtp=True)  # finds out the speculation mode
    Oracle(monkeypatch, expected, lambda position: position < 11 + 6)
    model.get_base_model().register_forward_hook(lambda *args: passes.append(len(streamer.got) - 1))
    streamer = Recorder()
    model.generate(**inputs, mtp=True, mtp_strategy="quadratic", streamer=streamer)
    assert passes[:3] == [0, 1, 5]
    assert len(streamer.got) == 13


def test_text_streamer_prints_the_text(capsys):
    model, tokenizer = upgraded("llama", k=3), tiny_tokenizer(97)
    output = generate(model, prompt(), mtp=True, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(output[0, 11:]).split()


def test_iterator_streamer_gives_text_as_it_is_accepted():
    model, tokenizer = upgraded("llama", k=3), tiny_tokenizer(97)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = Thread(target=generate, args=(model, prompt()), kwargs={"mtp": True, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == tokenizer.decode(generate(model, prompt())[0, 11:]).split()


def test_a_text_streamer_refuses_a_batch_as_in_plain_decoding():
    model, tokenizer = upgraded("llama", k=3), tiny_tokenizer(97)
    for mtp in (False, True):
        with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
            generate(model, prompt(rows=2), mtp=mtp, streamer=TextStreamer(tokenizer))


@pytest.mark.parametrize(
    "passes, pieces",
    [
        ([[6], [7, 8], [9]], ["w6", " w7 w8", " w9"]),
        ([[6, 7, 8]], ["w6 w7", " w8"]),  # `mtp=True` decodes some models plainly, and tells of no pass
    ],
)
def test_text_is_printed_as_it_comes(passes, pieces):
    shown = []
    printer = PiecePrinter(tiny_tokenizer(), shown.append, in_passes=True)
    printer.put(torch.tensor([[10, 11]]))  # the prompt
    for tokens in passes:
        for token in tokens:
            printer.put(torch.tensor([token]))
        if len(passes) > 1:
            printer.end_pass()
    assert shown == pieces
