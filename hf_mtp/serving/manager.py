"""The parts of `transformers serve` that load models and generate, for an adapter and its engine.

The handlers of transformers ask a model manager for the model, and a generation manager for its text.
"""

import asyncio
import json
from collections.abc import Callable, Container
from pathlib import Path

from fastapi import HTTPException
from transformers import GenerationConfig
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    GenerationState,
    Modality,
    _StreamError,
    get_response_template,
)
from transformers.utils import logging

from ..base.padding import end_tokens
from ..base.threads import in_own_thread
from ..data.survey import context_length
from ..passes.speculation_mode import SpeculationMode, speculation_mode
from ..pretrained import is_adapter, load_model, load_processor, refuse_other_adapter
from .engine import Engine
from .fields import FieldStream, fits
from .limits import Limits, bad_request
from .metrics import Metrics
from .request import Request, row_of
from .serial import SerialDecoder, SerialRequest
from .text import TextStream, first_of

logger = logging.get_logger(__name__)


class AdapterManager(ModelManager):
    """Loads one adapter with its base, under the name that the user gave. Arguments are those of [`ModelManager`]."""

    def load_model_and_processor(self, model_id_and_revision: str, *args, **kwargs):
        """The model and its tokenizer. The host would restart its clock for idle models, a thread, at each request."""
        loaded = self.loaded_models.get(model_id_and_revision)
        if loaded is not None:
            return loaded.model, loaded.processor
        return super().load_model_and_processor(model_id_and_revision, *args, **kwargs)

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None):
        name, hub = self._pinned(model_id_and_revision)
        if not is_adapter(name, **hub):
            raise ValueError(
                f"{name} is not an adapter, so it cannot predict several tokens. Pass an adapter that was trained "
                "with hf_mtp, or serve the model with `transformers serve`."
            )
        return load_processor(name, **hub)

    def _load_model(self, model_id_and_revision: str, tqdm_class=None, progress_callback=None, gguf_file=None):
        name, hub = self._pinned(model_id_and_revision)
        device = None if self.device == "auto" else self.device
        model = load_model(name, self.dtype or "auto", device, **hub).eval()
        refuse_other_adapter(model, name)
        return model

    def _pinned(self, model_id_and_revision: str) -> tuple[str, dict]:
        if model_id_and_revision != self.process_model_name(self.force_model):
            raise ValueError(f"This server has only the model {self.force_model}, but got {model_id_and_revision}.")
        if Path(self.force_model).exists():
            return self.force_model, {}
        name, _, revision = model_id_and_revision.partition("@")
        return name, {"revision": revision}

    @staticmethod
    def get_model_modality(model, processor=None) -> Modality:
        """What the base reads. Arguments are those of [`ModelManager`], which knows no adapters."""
        return ModelManager.get_model_modality(model.get_base_model(), processor)

    @property
    def takes_images(self) -> bool:
        """Whether the base reads images."""
        loaded = self.load_model_and_processor(self.process_model_name(self.force_model))
        return self.get_model_modality(*loaded) is not Modality.LLM

    @property
    def finds_fields(self) -> bool:
        """Whether tool calls and thoughts are found in the text of chats."""
        model, processor = self.load_model_and_processor(self.process_model_name(self.force_model))
        return get_response_template(processor, model) is not None

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The chat template, or several by their names."""
        return self.load_model_and_processor(self.process_model_name(self.force_model))[1].chat_template

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the base."""
        return self.load_model_and_processor(self.process_model_name(self.force_model))[0].base_model.vocab_size

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        """The one model, as `/v1/models` lists it."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "hf_mtp"}]

    get_gen_models = list_models  # its name before transformers 5.24

    def shutdown(self) -> None:
        """Keeps the model, which requests may be using: a server has no other."""


class Reply:
    """Takes the text of one request in the event loop that waits for it. This is the streamer of the handlers.

    Args:
        config ([`~transformers.GenerationConfig`]): The settings of the request.
        ends (`Container[int]`): Tokens that end a text.
        fields ([`FieldStream`], *optional*): Finds tool calls and thoughts.
    """

    def __init__(self, config: GenerationConfig, ends: Container[int], fields: FieldStream | None = None):
        self.loop, self.queue, self.fields = asyncio.get_running_loop(), asyncio.Queue(), fields
        self.config, self.ends = config, ends
        self.kept: list[str] = []  # text that is passed on at the end
        self.done: asyncio.Future = self.loop.create_future()
        self.request: Request | SerialRequest | None = None
        if fields is not None:
            self._put(fields.start())

    @property
    def total_tokens(self) -> int:
        """Number of new tokens so far."""
        return self.request.text.tokens

    def cancel(self) -> None:
        """Takes the request out of the batch before the next pass."""
        self.request.is_cancelled = True

    def on_text(self, text: str) -> None:
        """Passes on new text. Called in the engine's thread."""
        self.loop.call_soon_threadsafe(self._on_text, text)

    def on_end(self, error: Exception | None) -> None:
        """Passes on the end. Called in the engine's thread."""
        self.loop.call_soon_threadsafe(self._on_end, error)

    def _on_text(self, text: str) -> None:
        self._put([text] if self.fields is None else self.fields.feed(text))

    def _on_end(self, error: Exception | None) -> None:
        if self._ended_by_itself():
            self.config.max_new_tokens = None  # the host asks it whether the length ended the text
        for text in self.kept:
            self._on_text(text)
        if error is not None:
            self.queue.put_nowait(_StreamError(json.dumps(str(error))[1:-1]))  # the host puts it between quotes
        elif self.fields is not None:
            self._put(self.fields.end())
        self.queue.put_nowait(None)
        if not self.done.done():
            self.done.set_result(error)

    def _ended_by_itself(self) -> bool:
        """Whether the last token ended the text, which may also be the last one that was allowed."""
        return self.request.text.is_stopped or any(token in self.ends for token in self.request.new_ids[-1:])

    def _put(self, items: list) -> None:
        for item in items:
            self.queue.put_nowait(item)


class BatchedManager(BaseGenerateManager):
    """Generates with an [`Engine`], which decodes all requests in one batch.

    Args:
        limits ([`Limits`]): Of each request.
        metrics ([`Metrics`]): Counts to add to.
        strategy (`str`), max_rows (`int`): Those of the engine.
    """

    def __init__(self, limits: Limits, metrics: Metrics, strategy: str, max_rows: int):
        self.limits, self.metrics, self.strategy, self.max_rows = limits, metrics, strategy, max_rows
        self._engine: Engine | SerialDecoder | None = None

    def start(self, model) -> None:
        """Starts an engine, or a decoder of one request at a time for models whose rows cannot join a batch."""
        tuner = model.base_model
        if in_own_thread(lambda: speculation_mode(tuner.model)) is SpeculationMode.TREE:
            self._engine = Engine(tuner, self.strategy, self.max_rows, self.metrics)
        else:
            self._engine = SerialDecoder(model, self.strategy, self.metrics)
            logger.warning("This model does not support trees of drafts, so requests are decoded one after the other.")

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._engine is None or self._engine.is_alive

    def stop(self) -> None:
        """Stops the engine."""
        if self._engine is not None:
            self._engine.stop()

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        """Starts a request, and returns the queue of its text and its streamer."""
        self._check(model, inputs, gen_config)
        tokenizer, fields = getattr(processor, "tokenizer", processor), None
        if response_parser is not None and fits(
            get_response_template(processor, model), tokenizer.decode(inputs["input_ids"][0])
        ):
            fields = FieldStream(response_parser, tokenizer.all_special_tokens)
        reply = Reply(gen_config, end_tokens(model, gen_config), fields)
        # Each text wakes the event loop's thread, which takes the interpreter's lock from the engine for a moment.
        on_text = reply.kept.append if getattr(gen_config, "mtp_whole", False) else reply.on_text
        self._submit(reply, model, processor, inputs, gen_config, on_text, skip_special_tokens=fields is None)
        return reply.queue, reply

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        """Runs a request to its end: its text, the length of its prompt, and its new ids."""
        self._check(model, inputs, gen_config)
        reply = Reply(gen_config, end_tokens(model, gen_config))
        self._submit(reply, model, processor, inputs, gen_config, on_text=None, skip_special_tokens=True)
        try:
            error = await reply.done
        except asyncio.CancelledError:  # the client has gone
            reply.cancel()
            raise
        if error is not None:
            raise HTTPException(status_code=500, detail=str(error))
        ids = reply.request.new_ids
        text = processor.decode(ids, skip_special_tokens=True)
        place = first_of(text, reply.request.text.stop.strings)
        return text if place is None else text[:place], inputs["input_ids"].shape[-1], ids

    def _check(self, model, inputs, gen_config: GenerationConfig) -> None:
        """Refuses prompts that are too long, and cuts the length of the response to what the context holds."""
        tokens, context = inputs["input_ids"].shape[-1], context_length(model)
        most = min(self.limits.prompt_tokens, context - 1)
        if tokens > most:
            raise bad_request(
                f"The prompt has {tokens} tokens, but this server accepts at most {most}. Send a shorter prompt."
            )
        if tokens == 0:
            raise bad_request("The prompt is empty. Send at least one token of text.")
        gen_config.max_new_tokens = int(min(gen_config.max_new_tokens, context - tokens))

    def _submit(
        self,
        reply: Reply,
        model,
        processor,
        inputs,
        config: GenerationConfig,
        on_text: Callable[[str], None] | None,
        skip_special_tokens: bool,
    ) -> None:
        """Adds a request to the batch. The engine finds stop strings in the text, so `generate` need not."""
        stop, config.stop_strings = config.stop_strings or [], None
        tokenizer = getattr(processor, "tokenizer", processor).backend_tokenizer
        text = TextStream(tokenizer, [stop] if isinstance(stop, str) else stop, skip_special_tokens)
        seed, number = getattr(config, "mtp_seed", None), getattr(config, "mtp_number", 0)
        if isinstance(self._engine, SerialDecoder):
            reply.request = SerialRequest(inputs, config, seed, number, text, on_text, reply.on_end)
        else:
            row = row_of(model.base_model, inputs, config, seed, number)
            reply.request = Request(row, text, on_text, reply.on_end)
        try:
            self._engine.submit(reply.request)
        except RuntimeError as error:
            raise HTTPException(status_code=503, detail=str(error)) from error


class BatchedState(GenerationState):
    """The state of all handlers: one generation manager, since there is one model.

    Args:
        manager ([`BatchedManager`]): The generation manager.
    """

    def __init__(self, manager: BatchedManager):
        super().__init__()
        self.manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> BatchedManager:
        """The generation manager."""
        return self.manager

    def is_cb_alive(self) -> bool:
        """Whether requests are taken. `/health` asks for it."""
        return self.manager.is_alive

    def shutdown(self) -> None:
        """Stops the engine."""
        self.manager.stop()
