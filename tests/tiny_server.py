"""A server of a tiny model: starts it, asks it and watches it. conftest.py has the fixtures `server` and `client`."""

import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import get_peft_model
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import randomised
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from hf_mtp import GatedLoraConfig
from hf_mtp.serving.limits import Limits
from hf_mtp.serving.server import Server, ServerSettings

try:  # as the installed openai does
    import httpx2 as httpx
except ImportError:
    import httpx

K, CONTEXT, NEW_TOKENS = 3, 256, 24
LIMITS = Limits(body_bytes=20_000, new_tokens=64)
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that most characters beyond ASCII are several tokens; id 0 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {byte: index + 1 for index, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE)


def random_adapter(folder: Path, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | ProcessorMixin) -> str:
    """The folder of a random adapter, beside the folder `base` of its base."""
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base")
    randomised(get_peft_model(base, GatedLoraConfig(k=K, r=4, lora_alpha=8))).save_pretrained(folder / "adapter")
    return str(folder / "adapter")


@contextmanager
def served(adapter: str, **settings):
    """A running server."""
    server = Server(ServerSettings(adapter, port=0, limits=LIMITS, shutdown_seconds=5, **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: httpx.get(server.url.removesuffix("/v1") + "/health").status_code == 200)
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def wait_until(holds, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def messages(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def expected(
    server, text: str | list[int], stop: str | None = None, rows: int = 1, seed=None, **settings
) -> list[str]:
    """What plain `generate` makes of a prompt; of sampling, what the decode loop makes of it alone."""
    tokenizer, model = server.tokenizer, server.model
    inputs = tokenizer(text, return_tensors="pt")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": seed is not None, **settings}
    if seed is not None:
        settings |= {"mtp": True, "mtp_strategy": "linear", "generator": torch.Generator().manual_seed(seed)}
    output = model.generate(**inputs, num_return_sequences=rows, **settings)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def as_prompt(text: str) -> str:
    return f"user: {text}\n"


def complete(client, adapter, text: str, **settings):
    settings = {"temperature": 0, "max_tokens": NEW_TOKENS, **settings}
    return client.chat.completions.create(model=adapter, messages=messages(text), **settings)


def streamed(client, adapter, text: str, **settings) -> str:
    stream = complete(client, adapter, text, stream=True, **settings)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def counts(server) -> dict[str, float]:
    families = text_string_to_metric_families(server.metrics.text().decode())
    return {
        sample.name + "".join(sample.labels.values()): sample.value for family in families for sample in family.samples
    }


def collected(stream) -> tuple[dict[int, str], dict[int, str], list]:
    """Texts and finish reasons of the choices of a stream, and all of its chunks."""
    chunks, contents, reasons = list(stream), {}, {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        delta = choice.text if hasattr(choice, "text") else choice.delta.content
        contents[choice.index] = contents.get(choice.index, "") + (delta or "")
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return contents, reasons, chunks


class SlowEngine:
    """Makes passes slow enough that a request is still running when its client leaves."""

    def __init__(self, server, seconds: float = 0.05):
        self.loop, self.seconds = server.state.manager._engine.loop, seconds

    def __enter__(self):
        step = self.loop.step
        self.loop.step = lambda batch: (time.sleep(self.seconds), step(batch))[1]

    def __exit__(self, *_):
        del self.loop.step
