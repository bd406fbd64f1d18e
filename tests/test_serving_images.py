"""Images in requests: a server's response is that of plain decoding, also in a batch with other prompts."""

import base64
import concurrent.futures
import http.server
import io
import threading

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from test_prompts import IMAGE_MODELS, image_model
from tiny_models import upgraded
from tiny_server import SlowEngine, byte_tokenizer, collected, counts, random_adapter
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
)

from hf_mtp.pretrained import load_model
from hf_mtp.serving.engine import Engine
from hf_mtp.serving.request import Request, row_of

NEW_TOKENS, PIXELS, MARK = 12, 8, "<image>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """A random adapter on a random LLaVA, in float64, with a processor."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
    sides = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={
            **{"model_type": "llama", "vocab_size": len(tokenizer), "num_hidden_layers": 2, **sides},
            **{"max_position_embeddings": 256, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0},
        },
        vision_config={"model_type": "clip_vision_model", "num_hidden_layers": 1, "image_size": PIXELS, **sides}
        | {"patch_size": 4, "projection_dim": 16},
        image_token_id=tokenizer.convert_tokens_to_ids(MARK),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for layer in base.modules():  # so that the likeliest token depends on the text, and on the image
            if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
                layer.weight.normal_(0, 2 * layer.weight.shape[-1] ** -0.5)
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",  # without the class token
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return random_adapter(tmp_path_factory.mktemp("images"), base, processor)


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3))
    return Image.fromarray(pixels.astype("uint8"))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def data_url(seed: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(seed)).decode()}"


def with_image(text: str, url: str) -> list[dict]:
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


def pil_message(text: str, seed: int | None) -> list[dict]:
    """The message as the processor takes it."""
    image = [] if seed is None else [{"type": "image", "url": picture(seed)}]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *image]}]


def expected(adapter: str, server, text: str, image: int | None, rows: int = 1, seed: int | None = None) -> list[str]:
    """What `generate` makes of a prompt: plain decoding, or sampling of it alone."""
    processor = AutoProcessor.from_pretrained(adapter.replace("adapter", "base"))
    inputs = processor.apply_chat_template(
        pil_message(text, image), tokenize=True, return_dict=True, return_tensors="pt"
    )
    settings = {"do_sample": False}
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        settings = {"do_sample": True, "temperature": 1.0, "mtp": True, "generator": generator}
    output = server.model.generate(**inputs, max_new_tokens=NEW_TOKENS, num_return_sequences=rows, **settings)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def complete(client, adapter: str, messages: list[dict], **settings):
    settings = {"temperature": 0, "max_tokens": NEW_TOKENS, **settings}
    return client.chat.completions.create(model=adapter, messages=messages, **settings)


def content(response) -> str:
    return response.choices[0].message.content


# ---------------------------------------------------------------- what clients get


def test_a_response_to_an_image_is_that_of_plain_decoding(client, server, adapter):
    texts = []
    for seed in (1, 2):
        texts.append(content(complete(client, adapter, with_image("see", data_url(seed)))))
        assert texts[-1] == expected(adapter, server, "see", seed)[0]
    assert texts[0] != texts[1], "the image is not looked at"


def test_a_text_without_an_image(client, server, adapter):
    response = complete(client, adapter, [{"role": "user", "content": "see"}])
    assert content(response) == expected(adapter, server, "see", None)[0]


def test_images_and_texts_share_a_batch(client, server, adapter):
    jobs = [(f"see {number}", number if number % 2 else None) for number in range(8)]
    plain = [expected(adapter, server, *job)[0] for job in jobs]
    before = counts(server)

    def ask(job):
        text, seed = job
        messages = [{"role": "user", "content": text}] if seed is None else with_image(text, data_url(seed))
        return content(complete(client, adapter, messages))

    with SlowEngine(server, 0.02), concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, jobs)) == plain
    after = counts(server)
    passes, row_passes = (
        after[name] - before[name] for name in ("hf_mtp_forward_passes_total", "hf_mtp_row_passes_total")
    )
    assert row_passes > 1.5 * passes


def test_streamed_choices_of_an_image(client, server, adapter):
    settings = {"temperature": 1, "seed": 3, "n": 2, "stream": True}
    contents, _, _ = collected(complete(client, adapter, with_image("see", data_url(1)), **settings))
    rows = expected(adapter, server, "see", 1, rows=2, seed=3)
    assert [contents[index].rstrip("�") for index in (0, 1)] == [row.rstrip("�") for row in rows]


def test_images_of_the_responses_endpoint(client, server, adapter):
    parts = [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": data_url(1)}]
    for value in (parts, [{"role": "user", "content": parts}]):
        response = client.responses.create(model=adapter, input=value, max_output_tokens=NEW_TOKENS, temperature=0)
        assert response.output_text == expected(adapter, server, "see", 1)[0]


class Pictures(http.server.BaseHTTPRequestHandler):
    """Has one picture, and nothing else."""

    def do_GET(self):
        found = self.path == "/1.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(png(1) if found else b"not found")

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture(scope="module")
def pictures():
    """The address of a server of pictures."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{site.server_port}"
        site.shutdown()
        thread.join()


def test_images_are_downloaded(client, server, adapter, pictures):
    response = complete(client, adapter, with_image("see", f"{pictures}/1.png"))
    assert content(response) == expected(adapter, server, "see", 1)[0]


# ---------------------------------------------------------------- bad requests


def refusal(client, adapter, parts: list[dict]) -> str:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, adapter, [{"role": "user", "content": parts}])
    return refused.value.body["message"]


def test_files_of_the_server_are_not_read(client, adapter, tmp_path):
    path = tmp_path / "1.png"
    path.write_bytes(png(1))
    for url in (str(path), f"file://{path}", None, 3):
        message = refusal(client, adapter, with_image("see", url)[0]["content"])
        assert "The URL of `messages[0].content[1]` must start with data:image/" in message
        assert repr(url)[:20] in message


def test_what_is_no_image(client, adapter, pictures):
    for url in ("data:image/png;base64,AAAA", "data:image/png", f"{pictures}/2.png", "http://127.0.0.1:1/1.png"):
        message = refusal(client, adapter, with_image("see", url)[0]["content"])
        assert message.startswith("`messages[0].content[1]` cannot be loaded as an image"), url
        assert len(message) < 300


def test_other_kinds_of_parts_are_refused(client, adapter):
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    message = refusal(client, adapter, [sound])
    assert "`messages[0].content[0]` is of type 'input_audio', but this model reads only text and images" in message


# ---------------------------------------------------------------- the engine


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_rows_with_images_join_others(name):
    base, inputs = image_model(name)
    model = upgraded(base, k=3, dtype=torch.float64)
    prompts = [
        inputs,
        {**inputs, "pixel_values": -inputs["pixel_values"]},
        {"input_ids": inputs["input_ids"][:, -6:], "attention_mask": inputs["attention_mask"][:, -6:]},
    ]
    plain = [model.generate(**each, do_sample=False, max_new_tokens=NEW_TOKENS) for each in prompts]
    engine, done = Engine(model.base_model), threading.Semaphore(0)
    errors, requests = [], []
    for each in prompts:
        config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS)
        row = row_of(model.base_model, each, config, None)
        requests.append(Request(row, NoText(), None, lambda error: (errors.append(error), done.release())))
    for request in requests:
        engine.submit(request)
    for _ in requests:
        assert done.acquire(timeout=60)
    engine.stop()
    assert errors == [None] * len(prompts)
    for request, each in zip(requests, plain, strict=True):
        assert request.sequence.ids_1S.tolist() == each.tolist()
    assert engine.max_rows == (1 if name == "mllama" else 16)


class NoText:
    """The text of a model without a tokenizer."""

    is_stopped = False

    def feed(self, tokens: list[int]) -> str:
        return ""

    def end(self) -> str:
        return ""


def test_an_adapter_of_a_base_that_reads_images_is_loaded_with_it(adapter):
    assert type(load_model(adapter).get_base_model()).__name__ == "LlavaForConditionalGeneration"
