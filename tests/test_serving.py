"""The server: every response is that of plain decoding, whoever else is served, and bad requests get an answer."""

import concurrent.futures
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import openai
import pytest
import torch
from tiny_models import tiny_base
from tiny_server import (
    CONTEXT,
    NEW_TOKENS,
    SlowEngine,
    as_prompt,
    byte_tokenizer,
    collected,
    complete,
    counts,
    expected,
    messages,
    random_adapter,
    served,
    streamed,
    wait_until,
)
from tiny_text import words
from transformers import GenerationConfig

from hf_mtp.cli.app import app as command
from hf_mtp.decoding.batch import Batch
from hf_mtp.serving import manager
from hf_mtp.serving.serial import SerialRequest
from hf_mtp.serving.server import Server, ServerSettings
from hf_mtp.serving.text import StopStrings, TextStream

try:  # as the installed openai does
    import httpx2 as httpx
except ImportError:
    import httpx


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """A random adapter on a random base, in float64 and with a tokenizer of bytes."""
    base = tiny_base("llama", torch.float64, vocab_size=257, max_position_embeddings=CONTEXT)
    return random_adapter(tmp_path_factory.mktemp("serving"), base, byte_tokenizer())


# ---------------------------------------------------------------- what clients get


def test_the_model_has_the_name_that_was_given(client, adapter):
    assert [model.id for model in client.models.list()] == [adapter]


@pytest.mark.parametrize("text", ["hello", "what is a whale?", "ä"])
def test_greedy_responses_are_those_of_plain_decoding(client, server, adapter, text):
    plain = expected(server, as_prompt(text))[0]
    response = complete(client, adapter, text)
    assert response.choices[0].message.content == plain
    assert response.choices[0].finish_reason == "length"
    prompt_tokens = len(server.tokenizer(as_prompt(text))["input_ids"])
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (prompt_tokens, NEW_TOKENS)


def test_completions_and_responses_are_those_of_plain_decoding(client, server, adapter):
    text = client.completions.create(model=adapter, prompt="one two", max_tokens=NEW_TOKENS, temperature=0)
    assert text.choices[0].text == expected(server, "one two")[0]
    response = client.responses.create(model=adapter, input="hello", max_output_tokens=NEW_TOKENS, temperature=0)
    assert response.output_text == expected(server, as_prompt("hello"))[0]


def test_streams_have_the_same_text_in_one_chunk_per_pass(client, server, adapter):
    plain = expected(server, as_prompt("hello"))[0]
    before = counts(server)
    chunks = list(complete(client, adapter, "hello", stream=True))
    passes = counts(server)["hf_mtp_row_passes_total"] - before["hf_mtp_row_passes_total"]
    contents = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    # A random model writes broken characters, which a stream leaves out where they are cut off at the end.
    assert plain.rstrip("�").startswith("".join(contents).rstrip("�"))
    assert 0 < len(contents) <= passes
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == NEW_TOKENS


def test_a_stream_that_is_cut_within_a_character_has_the_text_of_generate(client, server, adapter):
    texts = {}
    for length in range(1, 9):
        text = streamed(client, adapter, "xyz", max_tokens=length)
        assert text == expected(server, as_prompt("xyz"), max_new_tokens=length)[0]
        texts[length] = text
    assert any(text.endswith("�") for text in texts.values())


def test_a_seed_gives_one_text_whoever_asks(client, server, adapter):
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    alone = expected(server, as_prompt("hello"), seed=5, temperature=0.8, top_p=0.9)[0]
    assert complete(client, adapter, "hello", **settings).choices[0].message.content == alone
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        others = [pool.submit(complete, client, adapter, words(4, i), temperature=1.3, seed=i) for i in range(3)]
        assert complete(client, adapter, "hello", **settings).choices[0].message.content == alone
        texts = [other.result().choices[0].message.content for other in others]
    assert texts == [expected(server, as_prompt(words(4, i)), seed=i, temperature=1.3)[0] for i in range(3)]


def test_a_request_leaves_the_global_generator_alone(client, adapter):
    torch.manual_seed(0)
    complete(client, adapter, "hello", temperature=1, seed=7)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_without_a_seed_texts_differ(client, adapter):
    assert len({complete(client, adapter, "hello", temperature=1).choices[0].message.content for _ in range(4)}) == 4


def test_several_choices_are_the_rows_of_generate(client, server, adapter):
    response = complete(client, adapter, "hello", temperature=1, seed=3, n=3)
    rows = expected(server, as_prompt("hello"), rows=3, seed=3, temperature=1.0)
    assert [choice.message.content for choice in response.choices] == rows and len(set(rows)) == 3
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert response.usage.completion_tokens == 3 * NEW_TOKENS


def test_streamed_choices_are_the_rows_of_generate(client, server, adapter):
    settings = {"temperature": 1, "seed": 3, "n": 3, "stream": True}
    contents, reasons, chunks = collected(complete(client, adapter, "hello", **settings))
    rows = expected(server, as_prompt("hello"), rows=3, seed=3, temperature=1.0)
    assert {index: text.rstrip("�") for index, text in contents.items()} == {
        index: text.rstrip("�") for index, text in enumerate(rows)
    }
    assert reasons == dict.fromkeys(range(3), "length")
    roles = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.role]
    assert sorted(roles) == [0, 1, 2]
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    prompt = len(server.tokenizer(as_prompt("hello"))["input_ids"])
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, 3 * NEW_TOKENS)
    assert usage.total_tokens == prompt + 3 * NEW_TOKENS


def test_streamed_choices_come_side_by_side(client, server, adapter):
    with SlowEngine(server, 0.02):
        order = [chunk.choices[0].index for chunk in complete(client, adapter, "hello", n=2, stream=True)]
    assert order.index(1) < len(order) - 1 - order[::-1].index(0), "the second choice waited for the first"


def test_streamed_choices_of_completions(client, server, adapter):
    settings = {"max_tokens": NEW_TOKENS, "temperature": 1, "seed": 3, "n": 2, "stream": True}
    contents, reasons, _ = collected(client.completions.create(model=adapter, prompt="one two", **settings))
    rows = expected(server, "one two", rows=2, seed=3, temperature=1.0)
    assert [contents[index].rstrip("�") for index in (0, 1)] == [row.rstrip("�") for row in rows]
    assert set(reasons.values()) == {"length"}


def test_a_client_that_leaves_streamed_choices_frees_all_rows(client, server, adapter):
    before = counts(server)
    with SlowEngine(server):
        stream = complete(client, adapter, "long", stream=True, n=3, max_tokens=64)
        next(iter(stream))
        wait_until(lambda: counts(server)["hf_mtp_running_requests"] == 3)
        stream.close()
        wait_until(lambda: counts(server)["hf_mtp_running_requests"] == 0)
    name = "hf_mtp_requests_totalcancelled"
    assert counts(server).get(name, 0) == before.get(name, 0) + 3


@pytest.mark.parametrize("n", [1, 2])
def test_a_pass_that_fails_ends_a_stream_with_its_error(client, server, adapter, n):
    loop = server.state.manager._engine.loop
    loop.step = lambda batch: (_ for _ in ()).throw(RuntimeError('out of\n"memory"'))
    try:
        with pytest.raises(openai.APIError, match='out of\n"memory"'):
            list(complete(client, adapter, "hello", n=n, stream=True))
    finally:
        del loop.step
    assert counts(server)["hf_mtp_running_requests"] == 0


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("path, prompt", [("chat/completions", "messages"), ("completions", "prompt")])
def test_the_last_event_of_a_stream_says_that_it_is_whole(server, path, prompt, n):
    body = {"stream": True, "n": n, "max_tokens": 4, prompt: messages("x") if prompt == "messages" else "x"}
    *events, last, rest = httpx.post(f"{server.url}/{path}", json=body).text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_text_and_do_not_belong_to_it(client, server, adapter, stream):
    plain = expected(server, as_prompt("hello"))[0]
    place = next(i for i in range(6, len(plain)) if plain[i] != "�" and plain.find(plain[i : i + 2]) == i)
    stop = plain[place : place + 2]
    if stream:
        assert streamed(client, adapter, "hello", stop=[stop, "never"]) == plain[:place]
    else:
        response = complete(client, adapter, "hello", stop=stop)
        assert response.choices[0].message.content == plain[:place]
        assert response.choices[0].finish_reason == "stop"
        assert response.usage.completion_tokens < NEW_TOKENS


def test_an_end_token_ends_a_text(server, client, adapter):
    ids = server.model.generate(**server.tokenizer("hello", return_tensors="pt"), max_new_tokens=NEW_TOKENS)[0, 5:]
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=int(ids[7]))
    response = client.completions.create(
        model=adapter, prompt="hello", extra_body={"generation_config": config.to_json_string(use_diff=False)}
    )
    assert response.choices[0].finish_reason == "stop"
    assert response.usage.completion_tokens == ids.tolist().index(int(ids[7])) + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ends", ["with its length", "with a token", "with a string"])
def test_a_text_that_ends_with_its_last_token_says_why(client, server, adapter, ends, stream):
    a, b = server.tokenizer("ab")["input_ids"]
    config = {"sequence_bias": [[[a], 50.0], [[a, a, b], 99.0]]}  # "aab"
    if ends == "with a token":
        config["eos_token_id"] = [0, b]
    stop = "b" if ends == "with a string" else None
    extra = {"generation_config": json.dumps(config)}
    response = complete(client, adapter, "x", max_tokens=3, stop=stop, stream=stream, extra_body=extra)
    last = [*response][-1] if stream else response
    assert last.usage.completion_tokens == 3
    assert last.choices[0].finish_reason == ("length" if ends == "with its length" else "stop")


def test_penalties_and_biases_are_those_of_plain_decoding(client, server, adapter):
    response = complete(client, adapter, "hello", frequency_penalty=0.5, logit_bias={"66": 5})
    plain = {"repetition_penalty": 1.5, "sequence_bias": {(66,): 5.0}}
    assert response.choices[0].message.content == expected(server, as_prompt("hello"), **plain)[0]
    settings = {"temperature": 0, "max_tokens": NEW_TOKENS, "frequency_penalty": 0.5, "logit_bias": {"66": 5}}
    response = client.completions.create(model=adapter, prompt="hello", **settings)
    assert response.choices[0].text == expected(server, "hello", **plain)[0]


def test_no_biases_change_nothing(client, server, adapter):
    response = complete(client, adapter, "hello", logit_bias={})
    assert response.choices[0].message.content == expected(server, as_prompt("hello"))[0]


def test_tools_pass_through_to_the_template(client, server, adapter):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    response = complete(client, adapter, "hello", tools=[tool])
    chat = server.tokenizer.apply_chat_template(messages("hello"), tools=[tool], tokenize=False)
    assert response.choices[0].message.content == expected(server, chat)[0]


def test_the_terminal_client_of_transformers(server, adapter, monkeypatch):
    from transformers.cli.chat import Chat

    typed = iter(["hello", "n", "!exit"])  # it asks whether to go on after the last token
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    before = counts(server)
    Chat(adapter, server.url.removesuffix("/v1"), [f"max_new_tokens={NEW_TOKENS}", "do_sample=False"], user="me")
    after = {name: value - before.get(name, 0) for name, value in counts(server).items()}
    assert after["hf_mtp_requests_totalfinished"] == 1
    assert after["hf_mtp_generated_tokens_total"] == NEW_TOKENS


# ---------------------------------------------------------------- many at a time

SETTINGS = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 0, "frequency_penalty": 0.4},
]


JOBS = [(words(1 + i % 7, i), SETTINGS[i % len(SETTINGS)], i, 8 + 5 * (i % 4)) for i in range(32)]


@pytest.fixture(scope="module")
def plain_texts(server) -> list[str]:
    """What plain decoding makes of each job alone."""
    texts = []
    for text, settings, seed, tokens in JOBS:
        options = {"max_new_tokens": tokens, "repetition_penalty": 1 + settings.get("frequency_penalty", 0)}
        if settings["temperature"]:
            options |= {"seed": seed, "temperature": settings["temperature"], "top_p": settings.get("top_p", 1.0)}
        texts += expected(server, as_prompt(text), **options)
    return texts


@pytest.mark.parametrize("strategy", ["auto", "quadratic", "linear"])
def test_eight_clients_get_their_own_responses(adapter, strategy, plain_texts):
    with served(adapter, strategy=strategy, max_rows=5) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)

        def ask(job):
            text, settings, seed, tokens = job
            return complete(client, adapter, text, seed=seed, max_tokens=tokens, **settings)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = [response.choices[0].message.content for response in pool.map(ask, JOBS)]
        assert found == plain_texts
        ended = counts(server)
        assert ended["hf_mtp_requests_totalfinished"] == len(JOBS)
        assert ended["hf_mtp_forward_passes_total"] < ended["hf_mtp_row_passes_total"]  # they shared passes


def test_a_client_that_goes_away_leaves_the_batch(client, server, adapter):
    before = counts(server)
    stream = complete(client, adapter, "long", stream=True, max_tokens=64)
    other = threading.Thread(target=complete, args=(client, adapter, "other"))
    next(iter(stream))
    other.start()
    stream.close()
    other.join()
    name = "hf_mtp_requests_totalcancelled"
    wait_until(lambda: counts(server)["hf_mtp_running_requests"] == 0)
    ended = {key: counts(server).get(key, 0) - before.get(key, 0) for key in (name, "hf_mtp_requests_totalfinished")}
    assert ended["hf_mtp_requests_totalfinished"] >= 1 and sum(ended.values()) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_generates_for_a_client_that_has_gone(server, adapter, stream):
    before = counts(server)
    body = {"model": adapter, "messages": messages("x"), "max_tokens": 64, "temperature": 0, "stream": stream}
    with SlowEngine(server):
        host, port = server.socket.getsockname()
        with socket.create_connection((host, port)) as connection:
            data = json.dumps(body).encode()
            head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Content-Length: {len(data)}"]
            head += ["Content-Type: application/json", "", ""]
            connection.sendall("\r\n".join(head).encode() + data)
            wait_until(lambda: counts(server)["hf_mtp_running_requests"] == 1)
        wait_until(lambda: counts(server)["hf_mtp_running_requests"] == 0)
    name = "hf_mtp_requests_totalcancelled"
    assert counts(server).get(name, 0) == before.get(name, 0) + 1
    assert counts(server)["hf_mtp_generated_tokens_total"] - before["hf_mtp_generated_tokens_total"] < 64


def test_a_slow_reader_does_not_hold_up_others(client, server, adapter):
    slow = iter(complete(client, adapter, "slow", stream=True, max_tokens=64))
    next(slow)
    assert complete(client, adapter, "quick").choices[0].message.content == expected(server, as_prompt("quick"))[0]
    assert sum(1 for _ in slow) > 1


def test_a_pass_that_fails_ends_its_requests_and_no_others(client, server, adapter):
    loop = server.state.manager._engine.loop
    loop.step = lambda batch: (_ for _ in ()).throw(RuntimeError("out of memory"))
    try:
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            complete(client, adapter, "hello")
    finally:
        del loop.step
    assert complete(client, adapter, "hello").choices[0].message.content == expected(server, as_prompt("hello"))[0]


# Scores that are infinite from the fifth token on, of which none can be sampled.
INFINITE = {"do_sample": True, "eos_token_id": 5, "exponential_decay_length_penalty": [4, 1e200]}


@pytest.mark.parametrize("strategy", ["quadratic", "linear"])
def test_settings_that_fail_in_the_middle_end_their_own_request_only(adapter, strategy):
    with served(adapter, strategy=strategy) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        client, engine = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0), server.state.manager._engine
        step, texts, everybody = engine.loop.step, ("one", "two", "three"), threading.Event()

        def step_once_all_came(batch):
            wait_until(lambda: everybody.is_set() or engine.waiting.qsize() == 3)  # besides the one that is read
            everybody.set()
            return step(batch)

        engine.loop.step = step_once_all_came
        answers = {text: pool.submit(complete, client, adapter, text, max_tokens=48) for text in texts}
        failing = pool.submit(
            complete, client, adapter, "hi", temperature=None, extra_body={"generation_config": json.dumps(INFINITE)}
        )
        with pytest.raises(openai.InternalServerError, match="No token can be sampled"):
            failing.result()
        for text, answer in answers.items():
            expect = expected(server, as_prompt(text), max_new_tokens=48)[0]
            assert answer.result().choices[0].message.content == expect
        assert counts(server)["hf_mtp_requests_totalfailed"] == 1 and not engine.loop.verifier.errors


@pytest.mark.parametrize("change", ["admit", "retire"])
def test_a_batch_that_cannot_change_ends_its_requests_and_no_others(client, server, adapter, change, monkeypatch):
    engine = server.state.manager._engine
    step, both = engine.loop.step, threading.Event()

    def step_once_both_came(batch):
        wait_until(lambda: both.is_set() or not engine.waiting.empty())
        both.set()
        return step(batch)

    def fail(*_):
        raise torch.OutOfMemoryError("no room for another row")

    engine.loop.step = step_once_both_came
    monkeypatch.setattr(Batch, change, fail)
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(complete, client, adapter, text, timeout=30) for text in ("one", "two")]
        for answer in answers:
            with pytest.raises(openai.InternalServerError, match="no room for another row"):
                answer.result()
    finally:
        del engine.loop.step
        monkeypatch.undo()
    assert complete(client, adapter, "hello").choices[0].message.content == expected(server, as_prompt("hello"))[0]


# ---------------------------------------------------------------- bad requests

BAD = {
    "no tokens": ({"max_tokens": 0}, "`max_tokens` must be an integer from 1 to 64"),
    "too many tokens": ({"max_tokens": 65}, "`max_tokens` must be an integer from 1 to 64"),
    "a temperature below 0": ({"temperature": -1}, "`temperature` must be a number from 0 to 2, but got -1"),
    "a share above 1": ({"top_p": 7}, "`top_p` must be a number from 0 to 1, but got 7"),
    "a temperature that is no number": ({"extra_body": {"temperature": "hot"}}, "`temperature` must be a number"),
    "log probabilities": ({"logprobs": True}, "`logprobs=True` is not supported by this server"),
    "a grammar": ({"response_format": {"type": "json_object"}}, "`response_format="),
    "a seed that is no number": ({"extra_body": {"seed": "x"}}, "`seed` must be an integer"),
    "no messages": ({"messages": []}, "`messages` must be a list of one or more"),
    "a message without a role": ({"messages": [{"content": "x"}]}, "Each message needs a `role`"),
    "content that is a part": (
        {"messages": [{"role": "user", "content": {"type": "text", "text": "x"}}]},
        "The `content` of a message must be a string or a list of parts",
    ),
    "content of no kind": (
        {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
        "`messages[0].content[0]` is of type None",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
        "`messages[0].content[1]` is of type 'image_url', but this model reads only text",
    ),
    "another model": ({"model": "other"}, "pinned"),
    "a prompt longer than the context": ({"messages": messages("x" * CONTEXT)}, "The prompt has 263 tokens"),
    "beam search": ({"extra_body": {"generation_config": '{"num_beams": 3, "max_new_tokens": 4}'}}, "num_beams=3"),
    "several rows": (
        {"temperature": 1, "extra_body": {"generation_config": '{"num_return_sequences": 2, "do_sample": true}'}},
        "`num_return_sequences=2` of `generation_config` is not supported by this server. Send `n` instead",
    ),
    "a stop that is no text": (
        {"stream": True, "extra_body": {"stop": ["x", 5]}},
        "`stop` must be a string or a list",
    ),
    "a config that is no JSON": ({"extra_body": {"generation_config": "{"}}, "must be the JSON text of an object"),
    "a bias of no token": ({"logit_bias": {"257": 1}}, "`logit_bias` takes token ids from 0 to 256, but got '257'"),
    "a bias that is no number": ({"logit_bias": {"66": "x"}}, "`logit_bias[66]` must be a number from -100 to 100"),
    "biases in a list": ({"extra_body": {"logit_bias": [66]}}, "`logit_bias` must be an object of token ids"),
    "a prompt that is cut": (
        {"extra_body": {"chat_template_kwargs": {"truncation": True, "max_length": 3}}},
        "`chat_template_kwargs` must be variables of the chat template, such as `enable_thinking`, but got",
    ),
    "too many choices": ({"n": 9, "stream": True}, "`n` must be an integer from 1 to 8"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests_say_what_is_wrong(client, server, adapter, kind):
    changes, message = BAD[kind]
    request = {"model": adapter, "messages": messages("x"), "temperature": 0, "max_tokens": 4, **changes}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**request)
    assert message in refused.value.body["message"]
    assert counts(server)["hf_mtp_running_requests"] == 0


@pytest.mark.parametrize("field", [{"logprobs": 0}, {"suffix": "end"}, {"echo": True}])
def test_completions_refuse_what_they_would_ignore(client, adapter, field):
    with pytest.raises(openai.BadRequestError, match="is not supported by this server. Leave it out"):
        client.completions.create(model=adapter, prompt="x", max_tokens=4, extra_body=field)


@pytest.mark.parametrize(
    "field",
    [
        {"text": {"format": {"type": "json_object"}}},
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"prompt": {"id": "pmpt_1"}},
        {"include": ["message.output_text.logprobs"]},
        {"background": True},
    ],
)
def test_responses_refuse_what_they_would_ignore(client, adapter, field):
    request = {"model": adapter, "input": "x", "max_output_tokens": 4}
    with pytest.raises(openai.BadRequestError, match="is not supported by this server. Leave it out"):
        client.responses.create(**request, extra_body=field)


def test_fields_that_change_nothing_are_accepted(client, adapter):
    neutral = {"text": {"format": {"type": "text"}}, "background": False, "include": [], "store": False}
    assert client.responses.create(model=adapter, input="x", max_output_tokens=4, **neutral).output_text
    neutral = {"logprobs": False, "presence_penalty": 0.0, "response_format": {"type": "text"}}
    assert complete(client, adapter, "x", **neutral).choices


def test_settings_that_need_a_missing_package_get_an_error_that_clients_read(client, server, adapter, monkeypatch):
    monkeypatch.setattr(manager, "row_of", lambda *_: (_ for _ in ()).throw(ImportError("quanto is missing")))
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="ImportError: quanto is missing"):
            complete(client, adapter, "x", stream=stream)


@pytest.mark.parametrize("name", ["wishes", "number"])  # the latter is set by the server itself, for choices
def test_unknown_fields_are_refused(name, client, adapter):
    with pytest.raises(openai.UnprocessableEntityError, match=name):
        complete(client, adapter, "x", extra_body={name: 3})


def test_bodies_that_are_no_requests(server):
    url = server.url + "/chat/completions"
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b'"text"'):
        response = httpx.post(url, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and "JSON" in response.json()["error"]["message"]
    half = rb'{"model": "\ud83d", "messages": [{"role": "user", "content": "x"}]}'  # of a surrogate pair
    response = httpx.post(url, content=half, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and r"requested '\ud83d'" in response.json()["error"]["message"]
    form = httpx.post(url, content=b"{}", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert form.status_code == 400 and "this header is 'application/x-www-form-u" in form.json()["error"]["message"]
    untyped = httpx.post(url, content=b"{}")
    assert untyped.status_code == 400 and "there is no such header" in untyped.json()["error"]["message"]
    large = httpx.post(url, content=b" " * 30_000)
    assert large.status_code == 413 and "larger than 20000 bytes" in large.json()["error"]["message"]
    chunked = httpx.post(url, content=(b" " * 1000 for _ in range(30)))
    assert chunked.status_code == 413
    assert httpx.get(url).status_code == 405 and httpx.get(server.url + "/nothing").status_code == 404


def test_lengths_end_where_the_context_does(client, server, adapter):
    text = "x" * (CONTEXT - 12)
    response = complete(client, adapter, text)
    assert response.usage.total_tokens == CONTEXT and response.choices[0].finish_reason == "length"


# ---------------------------------------------------------------- around the model


def test_requests_need_the_key(adapter):
    with served(adapter, api_key="s3cret") as server:
        root = server.url.removesuffix("/v1")
        for path, status in (("/v1/models", 401), ("/load_model", 401), ("/health", 200), ("/metrics", 200)):
            assert httpx.get(root + path).status_code == status
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            openai.OpenAI(base_url=server.url, api_key="other", max_retries=0).models.list()
        assert openai.OpenAI(base_url=server.url, api_key="s3cret").models.list().data[0].id == adapter
        for header, status in (("bearer  s3cret", 200), ("Basic s3cret", 401), ("Bearer", 401), ("s3cret", 401)):
            assert httpx.get(root + "/v1/models", headers={"Authorization": header}).status_code == status


def test_metrics_count_what_happened(client, server, adapter):
    before = counts(server)
    complete(client, adapter, "hello")
    after = {name: value - before.get(name, 0) for name, value in counts(server).items()}
    assert after["hf_mtp_generated_tokens_total"] == NEW_TOKENS
    assert after["hf_mtp_prompt_tokens_total"] == len(server.tokenizer(as_prompt("hello"))["input_ids"])
    assert after["hf_mtp_requests_totalfinished"] == after["hf_mtp_queue_seconds_count"] == 1
    assert after["hf_mtp_first_token_seconds_count"] == after["hf_mtp_request_seconds_count"] == 1
    assert 0 < after["hf_mtp_row_passes_total"] <= NEW_TOKENS
    assert after["hf_mtp_tokens_per_pass_sum"] == pytest.approx(NEW_TOKENS / after["hf_mtp_row_passes_total"])
    assert after["hf_mtp_drafts_total"] >= after["hf_mtp_accepted_drafts_total"]
    assert "# HELP hf_mtp_requests_total" in httpx.get(server.url.removesuffix("/v1") + "/metrics").text


def test_running_requests_finish_before_the_server_stops(adapter):
    with served(adapter) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
        plain = expected(server, as_prompt("last"))[0]
        with SlowEngine(server), concurrent.futures.ThreadPoolExecutor(1) as pool:
            last = pool.submit(complete, client, adapter, "last")
            wait_until(lambda: counts(server)["hf_mtp_running_requests"] == 1)
            server.stop()
            assert last.result().choices[0].message.content == plain
    assert not server.state.is_cb_alive()


def test_a_second_ctrl_c_stops_at_once(adapter):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_mtp.cli.main", "serve", adapter, "--port", str(port)]
    pipes = {"stderr": subprocess.STDOUT, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=heed_ctrl_c) as process:
        wait_until(lambda: is_healthy(port))
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            wait_until(lambda: is_healthy(port))  # so it has begun to read the request before
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert process.poll() is None, "it did not wait for the running request"
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what it starts in the background ignore Ctrl-C


def is_healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_port_in_use(server, adapter):
    port = server.socket.getsockname()[1]
    with pytest.raises(OSError, match=rf"port {port} of 127.0.0.1: Address already in use. Choose another"):
        Server(ServerSettings(adapter, port=port))


def test_an_address_of_another_machine(adapter):
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(OSError, match=rf"Cannot listen on port 0 of {host}: .*Pass an address of this machine"):
            Server(ServerSettings(adapter, port=0, host=host))


def test_an_unknown_strategy(adapter):
    with pytest.raises(ValueError, match="`strategy` must be one of auto, quadratic, linear, but got fast"):
        Server(ServerSettings(adapter, port=0, strategy="fast"))


def test_a_folder_that_does_not_exist():
    with pytest.raises(OSError, match="/no/such/folder is neither a folder nor the id of a repository"):
        Server(ServerSettings("/no/such/folder", port=0))


def test_a_base_is_no_adapter(adapter):
    with pytest.raises(ValueError, match="is not an adapter"):
        Server(ServerSettings(adapter.replace("adapter", "base"), port=0))


def test_a_model_that_allows_no_batch_is_served_one_after_the_other(tmp_path):
    adapter = random_adapter(tmp_path, tiny_base("bloom", torch.float64, vocab_size=257), byte_tokenizer())
    with served(adapter) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
        assert complete(client, adapter, "hello").choices[0].message.content == expected(server, as_prompt("hello"))[0]
        sampled = complete(client, adapter, "hello", temperature=1, seed=4, n=2).choices
        assert sampled[0].message.content == expected(server, as_prompt("hello"), seed=4, temperature=1.0)[0]
        assert sampled[0].message.content != sampled[1].message.content
        assert streamed(client, adapter, "hello", temperature=1, seed=4) == sampled[0].message.content
        _stops_at_a_string_and_for_a_client_that_leaves(client, server, adapter)
        _counts_what_happened(client, server, adapter)


def _counts_what_happened(client, server, adapter) -> None:
    before = counts(server)
    complete(client, adapter, "hello")
    after = {name: value - before[name] for name, value in counts(server).items()}
    expected(server, as_prompt("hello"), mtp=True)
    alone = server.model.mtp_statistics
    assert after["hf_mtp_generated_tokens_total"] == alone.tokens == NEW_TOKENS
    assert after["hf_mtp_row_passes_total"] == alone.row_passes
    assert after["hf_mtp_forward_passes_total"] == alone.forward_passes
    assert (after["hf_mtp_drafts_total"], after["hf_mtp_accepted_drafts_total"]) == (alone.drafted, alone.accepted)
    assert after["hf_mtp_first_token_seconds_count"] == after["hf_mtp_queue_seconds_count"] == 1
    assert after["hf_mtp_tokens_per_pass_sum"] == pytest.approx(NEW_TOKENS / alone.row_passes)


def test_a_request_that_decodes_plainly_or_is_cut_off_knows_its_passes():
    def request() -> SerialRequest:
        tokenizer = byte_tokenizer().backend_tokenizer
        made = SerialRequest({}, GenerationConfig(), None, 0, TextStream(tokenizer, []), None, lambda error: None)
        made.put(torch.tensor([[1, 2]]))  # the prompt
        return made

    plain, cut_off = request(), request()
    for token in (70, 71, 72):
        plain.put(torch.tensor([token]))
    for tokens in ((70,), (71, 72), (73,)):
        for token in tokens:
            cut_off.put(torch.tensor([token]))
        if tokens != (73,):
            cut_off.end_pass()
    assert plain.passes == cut_off.passes == 3


def _stops_at_a_string_and_for_a_client_that_leaves(client, server, adapter) -> None:
    plain = expected(server, as_prompt("hello"))[0]
    stop = next(character for character in plain if character != "�")  # the rest are bytes of no character
    place = plain.index(stop)
    assert streamed(client, adapter, "hello", stop=stop) == plain[:place]
    response = complete(client, adapter, "hello", stop=stop)
    assert response.choices[0].message.content == plain[:place] and response.choices[0].finish_reason == "stop"
    stream = complete(client, adapter, "long", stream=True, max_tokens=64)
    next(iter(stream))
    stream.close()
    wait_until(lambda: _ended(server) == 7)
    assert counts(server)["hf_mtp_running_requests"] == 0


def _ended(server) -> float:
    found = counts(server)
    return found["hf_mtp_requests_totalfinished"] + found.get("hf_mtp_requests_totalcancelled", 0)


def test_the_command_names_its_options():
    from typer.testing import CliRunner

    text = CliRunner().invoke(command, ["serve", "--help"], terminal_width=200).output
    assert all(option in text for option in ("--port", "--max-batch", "HF_MTP_API_KEY"))


# ---------------------------------------------------------------- text


def test_stop_strings_are_found_across_pieces():
    stops = ["abc", "bd", "zz"]
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choices("abcdz", k=generator.randint(0, 12)))
        places = [text.find(stop) for stop in stops if stop in text]
        stream, found, rest = StopStrings(stops), "", text
        while rest and not stream.found:
            cut = generator.randint(1, 3)
            found += stream.feed(rest[:cut])
            rest = rest[cut:]
        found += "" if stream.found else stream.flush()
        if not places:
            assert found == text and not stream.found
        else:  # of stop strings that come in one piece, the first one counts
            assert stream.found and min(places) == len(found) or found == text[: len(found)]
            assert not any(stop in found for stop in stops)


def test_characters_of_several_tokens_come_whole():
    tokenizer = byte_tokenizer()
    text = "naïve – 日本 🐳!"
    stream = TextStream(tokenizer.backend_tokenizer, [])
    pieces = [stream.feed([token]) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text and len(pieces) == len(text.encode())
    assert not any("�" in piece for piece in pieces)


def test_tokens_after_a_stop_string_do_not_count():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer.backend_tokenizer, ["–"])
    assert stream.feed(tokenizer("abc–def")["input_ids"]) == "abc"
    assert stream.is_stopped and stream.tokens == 3 + len("–".encode()) and stream.end() == ""


def test_a_special_token_is_a_stop_string_as_in_generate():
    tokenizer = byte_tokenizer()
    ids = [*tokenizer("naï")["input_ids"], 0, *tokenizer("ve")["input_ids"]]
    for stop, text in (("<eos>", "naï"), ("ïv", "na"), ("never", "naïve")):
        stream = TextStream(tokenizer.backend_tokenizer, [stop])
        assert stream.feed(ids) + stream.end() == text
        assert stream.is_stopped == (stop != "never")
    assert TextStream(tokenizer.backend_tokenizer, ["ve", "<eos>"]).feed(ids[:5]) == "naï"
    with_special = TextStream(tokenizer.backend_tokenizer, ["<eos>"], skip_special_tokens=False)
    assert with_special.feed(ids) == "naï" and with_special.is_stopped


def test_a_response_ends_before_a_special_token(client, server, adapter):
    config = GenerationConfig(max_new_tokens=8, sequence_bias={(66,): 50.0, (66, 66, 0): 99.0}, eos_token_id=5)
    plain = expected(server, "hello", generation_config=config, stop_strings="<eos>", tokenizer=server.tokenizer)
    extra = {
        "generation_config": json.dumps({"sequence_bias": [[[66], 50.0], [[66, 66, 0], 99.0]], "eos_token_id": 5})
    }
    response = client.completions.create(model=adapter, prompt="hello", stop="<eos>", max_tokens=8, extra_body=extra)
    assert response.choices[0].text == plain[0] == server.tokenizer.decode([66, 66])
    assert response.usage.completion_tokens == 3 and response.choices[0].finish_reason == "stop"


def test_the_model_is_loaded_and_tried_out_in_threads_that_end(adapter, monkeypatch):
    """OpenMP's helpers of any other thread would slow down the one that decodes."""
    threads = []

    def recorded(function):
        def record(*args, **kwargs):
            threads.append(threading.current_thread())
            return function(*args, **kwargs)

        return record

    monkeypatch.setattr(manager, "load_model", recorded(manager.load_model))
    monkeypatch.setattr(manager, "speculation_mode", recorded(manager.speculation_mode))
    with served(adapter):
        assert len(threads) == 2
        assert not any(thread.is_alive() for thread in threads)
