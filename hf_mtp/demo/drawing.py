"""Draws a race as HTML. Knows frames and text. Knows nothing of models, and nothing of Gradio."""

from html import escape

from .lane import Draft, LaneState, Pass
from .race import Frame

STRUCK_PASSES = 1  # the latest passes, whose rejected drafts are still shown
MOST_STRUCK = 6  # in the text; the list of passes has all
PASSES_LISTED = 400

PLAIN_TITLE, MTP_TITLE = "Plain decoding", "Multi-token prediction"
LEGEND = """
<ul class="race-legend" aria-label="Legend">
<li><span class="draft">draft</span> waits for the next pass</li>
<li><span class="kept">draft</span> accepted</li>
<li><del>draft</del> rejected</li>
<li><span class="own">token</span> of the base model itself</li>
</ul>"""


def draw_race(frame: Frame, most_tokens: int) -> str:
    """Both sides: meters on a track above, texts below.

    Args:
        frame ([`Frame`]): The race at one moment.
        most_tokens (`int`): The length of the track.
    """
    sides = (("plain", PLAIN_TITLE, frame.plain), ("mtp", MTP_TITLE, frame.mtp))
    ranks = _rank(frame.plain, frame.mtp), _rank(frame.mtp, frame.plain)
    tracks = "".join(_track(*side, most_tokens, rank) for side, rank in zip(sides, ranks, strict=True))
    texts = "".join(_text(kind, title, state) for kind, title, state in sides)
    passes = _list_of_passes(frame.mtp) if frame.is_finished else ""
    columns = f'<div class="race-tracks">{tracks}</div>{LEGEND}<div class="race-texts">{texts}</div>'
    return f'<div class="race">{columns}{passes}</div>'


def result_of(frame: Frame, dtype: str, is_bitwise: bool, can_be_bitwise: bool) -> str:
    """What came out of a finished race, in words.

    Args:
        frame ([`Frame`]): The last one.
        dtype (`str`): Of the model's weights.
        is_bitwise (`bool`), can_be_bitwise (`bool`): Whether the race was bit for bit, and whether it could be.
    """
    plain, mtp, ratio = frame.plain, frame.mtp, frame.speedup
    speed = f"{ratio:.2f} times as fast" if ratio >= 1 else f"slower, at {ratio:.2f} times the speed"
    speeds = (
        f"Multi-token prediction was {speed}: {mtp.seconds:.2f} s for {len(mtp.ids)} tokens, against "
        f"{plain.seconds:.2f} s for {len(plain.ids)}."
    )
    if frame.is_same_text:
        return f"{speeds} Both outputs are identical, token for token."
    part = f"{speeds} The outputs diverge after {frame.same_tokens} tokens"
    if is_bitwise:
        return f"{part}. That must not happen bit for bit: please report it."
    advice = " Tick “Bit for bit” to prevent it." if can_be_bitwise else ""
    return (
        f"{part}: a pass over several tokens rounds differently in {dtype}, so a near-tie between two tokens "
        f"flipped.{advice}"
    )


def _track(kind: str, title: str, state: LaneState, most_tokens: int, rank: str) -> str:
    share = 100 if state.is_finished else min(100, 100 * len(state.ids) / most_tokens)
    count = f'<span class="race-count">{len(state.ids)} of at most {most_tokens} tokens</span>' if state.ids else ""
    return (
        f'<section class="race-track {kind}" aria-label="{title}: meters">'
        f'<div class="race-head"><h3>{title}{rank}</h3>{count}</div>'
        f'<div class="race-bar" role="progressbar" aria-label="{title}: tokens" aria-valuemin="0" '
        f'aria-valuemax="{most_tokens}" aria-valuenow="{len(state.ids)}"><i style="width:{share:.1f}%"></i></div>'
        f"<dl>{_meters(kind, state)}</dl></section>"
    )


def _meters(kind: str, state: LaneState) -> str:
    numbers = [
        ("tokens/s", f"{state.tokens_per_second:.1f}"),
        ("tokens per pass", f"{state.tokens_per_pass:.2f}"),
        ("own clock", f"{state.seconds:.2f} s"),
    ]
    if kind == "mtp":
        numbers.append(("drafts accepted", f"{state.accepted} of {state.drafted}"))
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in numbers)


def _rank(state: LaneState, other: LaneState) -> str:
    """Whether a side is finished, and whether it was the first."""
    if not state.is_finished:
        return ""
    is_first = not other.is_finished or state.seconds < other.seconds
    return f' <span class="race-done">finished{" first" if is_first else ""}</span>'


def _text(kind: str, title: str, state: LaneState) -> str:
    latest = len(state.passes) - STRUCK_PASSES
    shows_struck = not state.is_finished
    parts = [_drawn_pass(each, shows_struck and number >= latest) for number, each in enumerate(state.passes)]
    text = "".join(parts) + _drawn_drafts(state.drafts)
    cursor = "" if state.is_finished or not state.passes else '<span class="cursor" aria-hidden="true"></span>'
    empty = '<span class="race-empty">The text will appear here.</span>' if not state.passes else ""
    return (
        f'<section class="race-text {kind}" aria-label="{title}: text" tabindex="0"><h4>{title}</h4>'
        f"<p>{text}{cursor}{empty}</p></section>"
    )


def _drawn_pass(done: Pass, shows_struck: bool) -> str:
    """Its tokens; accepted drafts are marked, and rejected ones are struck before the token that came instead."""
    kept, own = done.tokens[: done.accepted], done.tokens[done.accepted :]
    text = "".join(_span("kept", token) for token in kept)
    if shows_struck:
        struck = [f"<del>{_visible(draft.text)}</del>" for draft in done.drafts if not draft.is_accepted]
        text += "".join(struck[:MOST_STRUCK]) + ("<del>…</del>" if len(struck) > MOST_STRUCK else "")
    return text + "".join(_span("own", token) for token in own)


def _drawn_drafts(drafts: tuple[Draft, ...]) -> str:
    """The likeliest draft of each place, with its alternatives after it."""
    text = ""
    for place in sorted({draft.place for draft in drafts}):
        first, *others = (draft.text for draft in drafts if draft.place == place)
        text += f'<span class="draft">{_visible(first)}</span>'
        text += "".join(f'<span class="draft other">{_visible(other)}</span>' for other in others)
    return text


def _list_of_passes(state: LaneState) -> str:
    """Every pass with its drafts, to be read at leisure."""
    rows = "".join(_row_of_pass(number, done) for number, done in enumerate(state.passes[:PASSES_LISTED], start=1))
    return (
        f'<details class="race-passes"><summary>All {len(state.passes)} passes of multi-token prediction</summary>'
        "<table><thead><tr><th>pass</th><th>drafts that it verified</th><th>new tokens</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )


def _row_of_pass(number: int, done: Pass) -> str:
    drafts = " ".join(
        f'<span class="kept">{_visible(draft.text)}</span>'
        if draft.is_accepted
        else f"<del>{_visible(draft.text)}</del>"
        for draft in done.drafts
    )
    tokens = " ".join(f'<span class="chip">{_visible(token)}</span>' for token in done.tokens)
    return f"<tr><td>{number}</td><td>{drafts or 'none'}</td><td>{tokens}</td></tr>"


def _span(kind: str, text: str) -> str:
    return f'<span class="{kind}">{escape(text)}</span>'


def _visible(text: str) -> str:
    """A token that stands alone, with its line breaks as signs."""
    return escape(text.replace("\n", "⏎")) or "·"
