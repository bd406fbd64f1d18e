"""The page of the demo, made of Gradio's blocks."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr
from transformers.utils import logging

from ..decoding.generate import STRATEGIES
from .drawing import draw_race, result_of
from .lane import LaneState
from .race import Frame, RaceTrack
from .settings import HOTTEST, RaceSettings

logger = logging.get_logger(__name__)

STYLE = Path(__file__).with_name("style.css")
EMPTY = Frame(LaneState(), LaneState())
DEFAULT_TOKENS, MOST_TOKENS, MOST_WAITING = 128, 512, 16
PROMPTS = (
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell in all?",
    "Write a Python function that checks whether a number is prime.",
    "Why is the sky blue? Explain it to a child.",
)
TITLE = """# One prompt, two decoders

The model `{name}` answers twice. Plain decoding writes one token per forward pass. Multi-token prediction drafts
several tokens, and the model itself verifies them all in one pass. So the output is still that of the model."""
FAIRNESS = """**A fair race.** Both sides share this machine ({machine}) and would slow each other down if they ran at
the same time. So they take turns: after each forward pass, the side whose clock is behind continues. A clock runs only
while its side computes, from the start of its call, prefill included. So the bars advance as on two such machines, at
about half the speed. Plain decoding is the base model's own `generate`, without the adapter."""
WAITING, STOPPED = "Press “Race” to start.", "Stopped. Both columns show their progress so far."
RACING = "Racing. Drafts appear with a dashed underline, and the next pass accepts or rejects them."
NAMES = ("prompt", "max_new_tokens", "k", "strategy", "temperature", "seed", "bitwise", "slow")


def make_page(track: RaceTrack, name: str, machine: str) -> gr.Blocks:
    """The page. Its races run one at a time; others wait.

    Args:
        track ([`RaceTrack`]): The model.
        name (`str`): What the model is called.
        machine (`str`): Where it runs.
    """
    with gr.Blocks(title="hf_mtp: a race", analytics_enabled=False) as page, gr.Column(elem_id="race-page"):
        gr.Markdown(TITLE.format(name=name), elem_id="race-title")
        with gr.Row(elem_id="race-layout"):
            with gr.Column(elem_id="race-prompt"):
                prompt, start, stop = _prompt()
            with gr.Column(elem_id="race-stage"):
                status = gr.HTML(_status(WAITING), js_on_load=LIVE, elem_id="race-status")
                stage = gr.HTML(draw_race(EMPTY, DEFAULT_TOKENS), elem_id="race")
                gr.Markdown(FAIRNESS.format(machine=machine))
            with gr.Column(elem_id="race-settings"):
                settings = _settings(track)
        _connect(track, [prompt, *settings], [stage, status, start, stop])
    return page.queue(max_size=MOST_WAITING)


def _connect(track: RaceTrack, inputs: list[gr.components.Component], outputs: list[gr.components.Component]) -> None:
    """Lets the buttons start and stop races."""
    prompt, (_, status, start, stop) = inputs[0], outputs

    def race(*values) -> Iterator[tuple]:  # Gradio looks whether a function is a generator
        yield from _frames(track, _settings_of(values))

    shared = {"api_visibility": "private", "show_progress_on": status}
    racing = gr.on(
        [start.click, prompt.submit],
        race,
        inputs,
        outputs,
        concurrency_limit=1,
        trigger_mode="multiple",  # a press right after a stop counts, too; a disabled button prevents others
        show_progress="minimal",  # how many wait before
        **shared,
    )

    def halt() -> tuple:
        track.wait_until_ended()  # Gradio would cancel a race that is started before the last one has ended, too
        return _status(STOPPED), gr.update(interactive=True), gr.update(interactive=False)

    stop.click(halt, None, [status, start, stop], cancels=racing, queue=False, show_progress="hidden", **shared)


def _prompt() -> tuple[gr.Textbox, gr.Button, gr.Button]:
    prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=3, max_lines=8, info="Shift+Enter also starts the race.")
    with gr.Row():
        start = gr.Button("Race", variant="primary", elem_id="race-start", min_width=80)
        stop = gr.Button("Stop", interactive=False, elem_id="race-stop", min_width=80)
    gr.Examples([[text] for text in PROMPTS], [prompt], label="Prompts to try", cache_examples=False)
    return prompt, start, stop


def _settings(track: RaceTrack) -> list[gr.components.Component]:
    """The controls, in the order of [`NAMES`] after the prompt."""
    tokens = gr.Slider(16, MOST_TOKENS, DEFAULT_TOKENS, step=16, label="Maximum new tokens")
    k = gr.Slider(1, track.k, track.k, step=1, label="Masks per block (k)", info="How far ahead masks predict.")
    strategy = gr.Dropdown(list(STRATEGIES), value="auto", label="Strategy")
    temperature = gr.Slider(0, HOTTEST, 0, step=0.1, label="Temperature", info="0 is greedy decoding.")
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="Both sides sample with this seed.")
    bitwise = gr.Checkbox(
        track.defaults("", DEFAULT_TOKENS).bitwise,
        label="Bit for bit",
        info="Identical output in bfloat16 and float16, but slower."
        if track.can_be_bitwise
        else "Not possible with this model on this device.",
        interactive=track.can_be_bitwise,
    )
    slow = gr.Checkbox(False, label="Slow motion", info="Pauses after each pass. The clocks stop meanwhile.")
    return [tokens, k, strategy, temperature, seed, bitwise, slow]


def _settings_of(values: tuple) -> RaceSettings:
    """Settings from the values of the prompt and the controls. Sliders may give whole numbers as floats."""
    given = dict(zip(NAMES, values, strict=True))
    whole = {name: int(given[name]) for name in ("max_new_tokens", "k") if isinstance(given[name], float)}
    return RaceSettings(**{**given, **whole})


def _frames(track: RaceTrack, settings: RaceSettings) -> Iterator[tuple]:
    """What the page shows while a race runs: the stage, the status and both buttons."""
    yield draw_race(EMPTY, 1), _status("Getting ready."), gr.update(interactive=False), gr.update(interactive=True)
    status, stage = _status(RACING), gr.skip()
    try:
        for frame in track.run(settings):
            stage = draw_race(frame, settings.max_new_tokens)
            yield stage, status, gr.skip(), gr.skip()
            status = gr.skip()
        dtype = str(track.model.dtype).removeprefix("torch.")
        status = _status(result_of(frame, dtype, settings.bitwise, track.can_be_bitwise))
    except (ValueError, NotImplementedError) as error:  # their messages say all
        status = _status(str(error), is_error=True)
    except Exception as error:
        logger.exception("A race failed.")
        status = _status(f"{type(error).__name__}: {error}", is_error=True)
    yield stage, status, gr.update(interactive=True), gr.update(interactive=False)


def _status(text: str, is_error: bool = False) -> str:
    return f'<p class="race-alert">Error: {escape(text)}</p>' if is_error else f"<p>{escape(text)}</p>"


# A screen reader says what changes in here. Meters and texts, which change all the time, are elsewhere.
LIVE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
