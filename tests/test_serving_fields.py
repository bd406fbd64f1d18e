"""Tool calls and thoughts in responses of the server: stop strings are left out, and broken calls stay text."""

import json
import random
import re
import time

import openai
import pytest
import torch
from tiny_models import tiny_base
from tiny_server import TEMPLATE, as_prompt, byte_tokenizer, complete, counts, random_adapter, wait_until
from tiny_server import expected as plain_text
from transformers.cli.serving.utils import ToolCall, get_response_template
from transformers.utils.chat_parsing import ResponseParser

from hf_mtp.serving.fields import FieldStream, fits

CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
MOST = 14  # tokens before a forced one that it depends on


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """A random adapter on a Qwen3, whose responses transformers looks through for tool calls and thoughts."""
    base = tiny_base("qwen3", torch.float64, vocab_size=257, max_position_embeddings=512)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{{ '<|im_start|>assistant\n' }}"
    return random_adapter(tmp_path_factory.mktemp("fields"), base, tokenizer)


def saying(server, text: str) -> dict:
    """Settings with which the model answers "x" by a text."""
    prompt = server.tokenizer(as_prompt("x") + "<|im_start|>assistant\n")["input_ids"]
    ids, biases = [*prompt, *server.tokenizer(text)["input_ids"]], []
    for end in range(len(prompt) + 1, len(ids) + 1):
        biases.append([ids[max(0, end - MOST) : end], 300.0])
    config = {"sequence_bias": biases}
    return {"max_tokens": len(ids) - len(prompt), "extra_body": {"generation_config": json.dumps(config)}}


def answered(client, adapter, stream: bool, **settings) -> tuple[str, str, list, str]:
    """The text, thoughts, tool calls and reason for the end of a response to "x"."""
    response = complete(client, adapter, "x", stream=stream, **settings)
    choices = [chunk.choices[0] for chunk in response] if stream else response.choices
    parts = [choice.delta if stream else choice.message for choice in choices]
    calls = [call for part in parts for call in part.tool_calls or []]
    texts = ["".join(getattr(part, name, None) or "" for part in parts) for name in ("content", "reasoning_content")]
    return *texts, [(call.function.name, call.function.arguments) for call in calls], choices[-1].finish_reason


ANSWERS = {
    "a text": ("Hello. Bye", None, ("Hello. Bye", "", [], "length")),
    "a stop string": ("Hello. Bye", ". B", ("Hello", "", [], "stop")),
    "a thought": ("<think>hm</think>Hi", None, ("Hi", "hm", [], "length")),
    "a thought that is cut": ("<think>hm hm", None, ("", "hm hm", [], "length")),
    "a call": (f"Hi {CALL}", None, ("Hi", "", [("f", '{"x": 1}')], "tool_calls")),
    "a call that is cut": ('Hi <tool_call>{"name": "f', None, ('Hi <tool_call>{"name": "f', "", [], "length")),
    "a call with a stop string": ('<tool_call>{"name": 1}', "1", ('<tool_call>{"name": ', "", [], "stop")),
    "a call without arguments": (
        '<tool_call>{"name": "f", "arguments": null}</tool_call>',
        None,
        ("", "", [("f", "{}")], "tool_calls"),
    ),
    "a call of a number": (
        'Hi <tool_call>{"name": 5, "arguments": {}}</tool_call>',
        None,
        ('Hi <tool_call>{"name": 5, "arguments": {}}</tool_call>', "", [], "length"),
    ),
    "arguments that are no object": (
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        None,
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "", [], "length"),
    ),
    "a call that is no JSON": (
        "Hi <tool_call>{f}</tool_call>!",
        None,
        ("Hi <tool_call>{f}</tool_call>!", "", [], "length"),
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ANSWERS)
def test_fields_are_found_and_what_is_none_stays_text(client, server, adapter, kind, stream):
    text, stop, expected = ANSWERS[kind]
    assert answered(client, adapter, stream, stop=stop, **saying(server, text)) == expected


@pytest.mark.parametrize(
    "text, calls, content",
    [
        (CALL * 2, 2, ""),
        (f"Hi{CALL}<|im_end|>", 1, "Hi"),
        (f"Hi{CALL}\n<tool_call>{{", 1, "Hi</tool_call>\n<tool_call>{"),  # the parser does not tell where a call ended
        ("Hi <tool_call>{}</tool_call><|im_end|>", 0, "Hi <tool_call>{}</tool_call>"),
        ("Hi <tool_call>x</tool_call> you<|im_end|>", 0, "Hi <tool_call>x</tool_call> you"),
    ],
)
def test_the_pieces_in_which_a_text_comes_do_not_matter(server, text, calls, content):
    template, generator = get_response_template(server.tokenizer, server.model), random.Random(0)
    for _ in range(50):
        fields = FieldStream(ResponseParser(template, prefix="<|im_start|>assistant\n"), ["<|im_end|>"])
        pieces = re.findall(rf"<\|im_end\|>|(?:(?!<\|im_end).){{1,{generator.randint(1, 9)}}}", text, re.DOTALL)
        items = [*fields.start(), *(item for piece in pieces for item in fields.feed(piece)), *fields.end()]
        assert "".join(item for item in items if isinstance(item, str)) == content
        assert [item.name for item in items if isinstance(item, ToolCall)] == ["f"] * calls


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_of_another_form_is_no_part_of_the_response(client, server, adapter, stream, monkeypatch):
    monkeypatch.setattr(server.tokenizer, "chat_template", TEMPLATE)
    plain = plain_text(server, as_prompt("x"), max_new_tokens=8)[0]
    assert answered(client, adapter, stream, max_tokens=8) == (plain, "", [], "length")


@pytest.mark.parametrize(
    "template, is_fit",
    [
        ({}, True),
        ({"start_anchor": "<a>"}, True),
        ({"start_anchor": ["<b>", "<a>"]}, True),
        ({"start_anchor": "<b>"}, False),
        ({"start_anchor_pattern": "<[ab]>"}, True),
        ({"start_anchor_pattern": "<[bc]>"}, False),
    ],
)
def test_a_template_fits_a_prompt_that_has_its_anchor(template, is_fit):
    assert fits(template, "user<a>") is is_fit


def test_choices_and_usage(client, server, adapter):
    response = complete(client, adapter, "x", n=2, stop=". B", **saying(server, "Hello. Bye"))
    assert [choice.message.content for choice in response.choices] == ["Hello", "Hello"]
    assert response.usage.completion_tokens == 2 * len("Hello. B") and response.object == "chat.completion"


def test_responses_have_no_stop_string_of_a_config(client, server, adapter):
    settings = saying(server, "Hello. Bye")
    config = {**json.loads(settings["extra_body"]["generation_config"]), "stop_strings": [". B"]}
    request = {"model": adapter, "input": "x", "temperature": 0, "max_output_tokens": settings["max_tokens"]}
    response = client.responses.create(**request, extra_body={"generation_config": json.dumps(config)})
    assert response.output_text == "Hello" and response.usage.output_tokens == len("Hello. B")


def test_errors_of_responses_that_are_not_streamed(client, server, adapter):
    loop = server.state.manager._engine.loop
    loop.step = lambda batch: (_ for _ in ()).throw(RuntimeError('out of\n"memory"'))
    try:
        with pytest.raises(openai.InternalServerError, match='out of\n"memory"'):
            complete(client, adapter, "hello")
        with pytest.raises(openai.InternalServerError, match="out of"):
            client.responses.create(model=adapter, input="x")
    finally:
        del loop.step


def test_a_client_that_goes_away_leaves_the_batch(client, server, adapter):
    step = server.state.manager._engine.loop.step

    def slow_step(batch):
        time.sleep(0.05)
        return step(batch)

    server.state.manager._engine.loop.step = slow_step
    try:
        before = counts(server).get("hf_mtp_requests_totalcancelled", 0)
        with pytest.raises(openai.APITimeoutError):
            complete(client, adapter, "x", max_tokens=64, timeout=0.5)
        wait_until(lambda: counts(server).get("hf_mtp_requests_totalcancelled", 0) == before + 1)
    finally:
        del server.state.manager._engine.loop.step


RESPONSES = {
    "a text": ("Hello", [("message", "Hello")]),
    "a call": (CALL, [("function_call", '{"x": 1}')]),
    "a call behind a text": (f"Hi {CALL}", [("message", "Hi"), ("function_call", '{"x": 1}')]),
    "a call between texts": (f"a{CALL}b", [("message", "a"), ("function_call", '{"x": 1}'), ("message", "b")]),
    "a thought": ("<think>hm</think>Hi", [("reasoning", "hm"), ("message", "Hi")]),
    "a thought alone": ("<think>hm hm", [("reasoning", "hm hm")]),
    "a thought within a text": ("a<think>b</think>c", [("message", "ac"), ("reasoning", "b")]),
}


def items_of(output) -> list[tuple[str, str]]:
    return [
        (item.type, item.content[0].text if item.content else "")
        if item.type != "function_call"
        else (item.type, item.arguments)
        for item in output
    ]


@pytest.mark.parametrize("is_cut", [True, False])
@pytest.mark.parametrize("kind", RESPONSES)
def test_items_of_responses_have_numbers_of_their_own_and_a_status(client, server, adapter, kind, is_cut):
    text, items = RESPONSES[kind]
    settings = saying(server, text if is_cut else f"{text}~")
    request = {"model": adapter, "input": "x", "temperature": 0, "max_output_tokens": settings.pop("max_tokens")}
    if not is_cut:
        settings["extra_body"]["generation_config"] = json.dumps(
            {**json.loads(settings["extra_body"]["generation_config"]), "stop_strings": ["~"]}
        )
    with client.responses.stream(**request, **settings) as stream:  # which refuses a number that comes twice
        events = list(stream)
    last, whole = events[-1], client.responses.create(**request, **settings)
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(range(len(events)))
    assert last.type == ("response.incomplete" if is_cut else "response.completed")
    done = [event.item for event in events if event.type == "response.output_item.done"]
    for response in (last.response, whole):
        assert response.status == ("incomplete" if is_cut else "completed")
        assert (response.incomplete_details and response.incomplete_details.reason) == (
            "max_output_tokens" if is_cut else None
        )
        assert items_of(response.output) == items
        assert sorted(items_of(done)) == sorted(items)
        is_open = is_cut and done[-1].type != "function_call"
        statuses = ["completed"] * (len(items) - 1) + ["incomplete" if is_open else "completed"]
        assert [item.status for item in done] == statuses
        assert {item.type: item.status for item in response.output} == {item.type: item.status for item in done}
        assert len({item.id for item in response.output}) == len(items)


def test_a_response_can_be_sent_back(client, server, adapter):
    settings = saying(server, "<think>hm</think>Hi")
    settings["max_output_tokens"] = settings.pop("max_tokens")
    first = client.responses.create(model=adapter, input="x", temperature=0, **settings)
    turns = [{"role": "user", "content": "x"}, *first.output, {"role": "user", "content": "y"}]
    assert client.responses.create(model=adapter, input=turns, max_output_tokens=4).output
