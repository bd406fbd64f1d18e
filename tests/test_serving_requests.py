"""What OpenAI's clients send: all of a conversation reaches the chat template, and no field is ignored in silence."""

import json

import openai
import pytest
import torch
from tiny_models import tiny_base
from tiny_server import byte_tokenizer, complete, expected, httpx, messages, random_adapter
from transformers.cli.serving.utils import Modality

from hf_mtp.serving.messages import template_messages, with_instructions

ALL = "{{ messages | tojson }}{{ tools | tojson }}"  # a chat template that leaves nothing out


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("requests")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ALL
    base = tiny_base("llama", torch.float64, vocab_size=257, max_position_embeddings=1024)
    return random_adapter(folder, base, tokenizer)


def answer(server, conversation: list[dict], tools: list[dict] | None = None, **settings) -> str:
    """What plain decoding answers to a conversation."""
    tokenizer = server.tokenizer
    prompt = tokenizer.apply_chat_template(conversation, tools=tools, add_generation_prompt=True, tokenize=False)
    return expected(server, prompt, **settings)[0]


def call(arguments) -> dict:
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CONVERSATION = [
    {"role": "user", "content": "x", "name": "ann"},
    {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": [call('{"y": 1}')]},
    {"role": "tool", "content": "5", "tool_call_id": "call_1", "name": "f"},
]


# ---------------------------------------------------------------- messages


def test_all_of_a_conversation_reaches_the_template(client, server, adapter):
    asked = [CONVERSATION[0], {**CONVERSATION[1], "tool_calls": [call({"y": 1})]}, CONVERSATION[2]]
    settings = {"temperature": 0, "max_tokens": 24}
    response = client.chat.completions.create(model=adapter, messages=CONVERSATION, tools=[TOOL], **settings)
    assert response.choices[0].message.content == answer(server, asked, [TOOL])


def test_all_items_of_an_input_reach_the_template(client, server, adapter):
    items = [
        {"role": "user", "content": "x"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": ""},
        {"type": "function_call_output", "call_id": "call_1", "output": "5"},
    ]
    made = [{"id": "call_1", "function": {"name": "f", "arguments": {}}}]
    conversation = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": made},
        {"role": "tool", "tool_call_id": "call_1", "content": "5"},
    ]
    response = client.responses.create(model=adapter, input=items, temperature=0, max_output_tokens=24)
    assert response.output_text == answer(server, conversation)


@pytest.mark.parametrize("arguments", ["", " ", "{}", {}])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    message = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
    (made,) = template_messages([message], Modality.LLM, ALL)
    assert made == {"role": "assistant", "content": "", "tool_calls": [call({})]}


def test_fields_without_a_value_do_not_reach_the_template():
    """Clients send back what they got. Templates ask whether there is a field such as `tool_calls`."""
    message = {"role": "assistant", "content": "x", "refusal": None, "function_call": None, "tool_calls": []}
    assert template_messages([message], Modality.LLM, ALL) == [{"role": "assistant", "content": "x"}]


@pytest.mark.parametrize("template, role", [(ALL, "system"), ("{% if role == 'developer' %}", "developer")])
def test_a_developer_is_the_system_where_the_template_knows_none(template, role):
    message = {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}
    assert template_messages([message], Modality.LLM, template) == [{"role": role, "content": "Be brief."}]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_replace_no_system_message(client, server, adapter, role):
    items = [{"role": role, "content": "You are a pirate."}, {"role": "user", "content": "x"}]
    request = {"model": adapter, "instructions": "Be brief.", "temperature": 0, "max_output_tokens": 24}
    conversation = [{"role": "system", "content": "Be brief.\n\nYou are a pirate."}, items[1]]
    assert client.responses.create(input=items, **request).output_text == answer(server, conversation)
    conversation[0]["content"] = "Be brief."
    assert client.responses.create(input=items[1:], **request).output_text == answer(server, conversation)
    parts = [{"type": "input_text", "text": "Arr."}]
    made = with_instructions({**request, "input": [{"role": role, "content": parts}]})
    assert made["input"][0]["content"] == [{"type": "input_text", "text": "Be brief."}, *parts]


# ---------------------------------------------------------------- fields

BAD = {
    "a call of no function": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        "Each of `tool_calls` needs a `function` with a `name`",
    ),
    "a call that is a text": (
        {"messages": [{"role": "assistant", "tool_calls": ["f"]}]},
        "Each of `tool_calls` needs a `function` with a `name` and `arguments`, but got 'f'",
    ),
    "arguments that are no JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [call("{y")]}]},
        "The `arguments` of the tool call 'f' must be the JSON text of an object, but got '{y'",
    ),
    "arguments that are a list": (
        {"messages": [{"role": "assistant", "tool_calls": [call("[1]")]}]},
        "must be the JSON text of an object, but got '[1]'",
    ),
    "a call of the old form": (
        {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}]},
        "Send `tool_calls`",
    ),
    "a tool that is no function": (
        {"tools": [TOOL, {"type": "custom", "custom": {"name": "c"}}]},
        "`tools[1]` is of type 'custom', but this server supports only 'function'",
    ),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "`tools[0]` must be a function with"),
    "tools that are no list": ({"tools": "f"}, "`tools` must be a list of functions"),
    "one call at most": ({"tools": [TOOL], "parallel_tool_calls": False}, "`parallel_tool_calls=False` is not"),
    "no call": ({"tools": [TOOL], "tool_choice": "none"}, "`tool_choice='none'` is not"),
    "an effort": ({"reasoning_effort": "high"}, "`reasoning_effort='high'` is not supported"),
    "a verbosity": ({"verbosity": "low"}, "`verbosity='low'` is not supported"),
    "a stream that is a text": ({"stream": "false"}, "`stream` must be true or false, but got 'false'"),
    "a penalty that is too low": ({"frequency_penalty": -1}, "`frequency_penalty` must be above -1"),
    "a penalty that is too high": (
        {"frequency_penalty": 10**400},
        "`frequency_penalty` must be a number from -1 to 2",
    ),
    "variables in a list": ({"chat_template_kwargs": [1]}, "`chat_template_kwargs` must be an object, but got [1]"),
    "an unknown setting": ({"generation_config": '{"topk": 2}'}, "`generation_config` has unknown settings: topk"),
    "a setting of our own": ({"generation_config": '{"mtp_number": 2}'}, "has unknown settings: mtp_number"),
    "a length of the whole": ({"generation_config": '{"max_length": 9}'}, "Send `max_new_tokens` instead"),
    "a config that is no object": ({"generation_config": "[]"}, "`generation_config` must be the JSON text of an obj"),
    "a config that is no text": ({"generation_config": {"top_k": 2}}, "must be the JSON text of an object, but got {"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_would_be_ignored_or_misread_is_refused(server, adapter, kind):
    changes, message = BAD[kind]
    body = {"model": adapter, "messages": messages("x"), "max_tokens": 4, **changes}
    response = httpx.post(f"{server.url}/chat/completions", json=body)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "field, message",
    [
        ({"tools": [{"type": "web_search"}]}, "is of type 'web_search', but this server supports only 'function'"),
        ({"reasoning": {"effort": "low"}}, "is not supported by this server. Leave it out"),
        ({"context_management": [{"type": "compaction"}]}, "is not supported by this server. Leave it out"),
        ({"tools": [{"type": "function", "name": "f"}], "parallel_tool_calls": False}, "Leave it out"),
    ],
)
def test_responses_refuse_what_they_would_ignore(client, adapter, field, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.responses.create(model=adapter, input="x", max_output_tokens=4, extra_body=field)


def test_tools_that_the_template_leaves_out_are_refused(client, server, adapter, monkeypatch):
    monkeypatch.setattr(server.tokenizer, "chat_template", "{{ messages | tojson }}")
    with pytest.raises(openai.BadRequestError, match="`tools` are not supported by this model: its chat template"):
        complete(client, adapter, "x", tools=[TOOL])
    assert complete(client, adapter, "x", tools=[]).choices


def test_fields_of_tools_change_nothing_without_tools(client, server, adapter):
    plain = answer(server, messages("x"))
    for neutral in ({"tool_choice": "none"}, {"parallel_tool_calls": False}, {"tools": []}):
        assert complete(client, adapter, "x", **neutral).choices[0].message.content == plain
    text = client.responses.create(
        model=adapter, input="x", temperature=0, max_output_tokens=24, parallel_tool_calls=False
    ).output_text
    assert text == plain


FIELDS = {
    "chat/completions": ("messages", messages("x"), "max_tokens"),
    "completions": ("prompt", "x", "max_tokens"),
    "responses": ("input", "x", "max_output_tokens"),
}
EMPTY = (
    "stop",
    "tools",
    "logit_bias",
    "chat_template_kwargs",
    "generation_config",
    "parallel_tool_calls",
    "stream",
    "n",
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", FIELDS)
def test_a_field_that_is_null_was_left_out(server, adapter, path, stream):
    prompt, value, most = FIELDS[path]
    body = {"model": adapter, **dict.fromkeys((*EMPTY, "seed", "top_p", "instructions", "user")), "temperature": 0}
    body |= {prompt: value, most: 3, "stream": stream}
    response = httpx.post(f"{server.url}/{path}", json=body)
    assert response.status_code == 200
    whole = httpx.post(f"{server.url}/{path}", json={n: v for n, v in body.items() if v is not None})
    if not stream:
        text = [(r.json().get("choices") or r.json()["output"][0]["content"])[0] for r in (response, whole)]
        assert text[0] == text[1]


@pytest.mark.parametrize("asked", [{"temperature": 1.5}, {"top_p": 0.9}])
def test_a_temperature_samples_beside_other_settings(client, server, adapter, asked):
    config = {"top_k": 20}
    response = complete(
        client,
        adapter,
        "x",
        seed=3,
        extra_body={"generation_config": json.dumps(config)},
        **{"temperature": None, **asked},
    )
    assert response.choices[0].message.content == answer(server, messages("x"), seed=3, **config, **asked)
    greedy = complete(
        client, adapter, "x", extra_body={"generation_config": json.dumps({**config, "do_sample": True})}
    )
    assert greedy.choices[0].message.content == answer(server, messages("x"))


# ---------------------------------------------------------------- other endpoints


def test_one_model_can_be_retrieved(client, server, adapter):
    assert client.models.retrieve(adapter) == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match=f"This server has only the model {adapter}, but got other/one"):
        client.models.retrieve("other/one")


def test_an_error_that_nobody_expected_has_openai_s_form(server):
    response = httpx.post(server.url.removesuffix("/v1") + "/load_model", json={"model": 5})
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
