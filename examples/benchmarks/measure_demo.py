#!/usr/bin/env python
"""Measure `hf-mtp demo` in headless Chromium: the time from the button to the first token, and whether races are fair.

python examples/benchmarks/measure_demo.py BASE --adapter ADAPTER --output docs/results/demo.json

Needs `pip install hf_mtp[demo] playwright` and a Chromium. Two measurements:

- first token: from the press of the button to the first token on the page, by the browser's clock, for `--presses`
  presses on each of a wide and a narrow window; and the processor's time of the whole server meanwhile, which tells
  more on a machine that is busy with other things.
- fairness: the same prompts decoded by each side alone, and in a race, in turn: seconds in the race by its own clock,
  divided by seconds alone.

`--screenshots FOLDER` also writes a picture of each window in the middle of a race. The last line of the output is one
JSON document. `--output` is written after each part.
"""

import argparse
import os
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright
from report import finish, save

from hf_mtp.base.machine import describe_machine
from hf_mtp.demo.app import Demo, DemoSettings
from hf_mtp.demo.page import PROMPTS
from hf_mtp.demo.race import RaceTrack
from hf_mtp.demo.settings import RaceSettings
from hf_mtp.evaluation.run import adapter_fingerprint

WINDOWS = {"wide": (1280, 900, "light"), "narrow": (390, 844, "dark")}
PATIENCE = 600_000  # milliseconds
# Resolves to the milliseconds from the press to the first token in either column.
PRESS = """() => new Promise(resolve => {
  const start = performance.now();
  new MutationObserver((_, observer) => {
    if (!document.querySelector('.race-text .own')) return;
    observer.disconnect();
    resolve(performance.now() - start);
  }).observe(document.querySelector('#race'), {subtree: true, childList: true});
  document.querySelectorAll('.race-text .own').forEach(token => token.remove());
  document.querySelector('#race-start').click();
})"""


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="Hub id or folder of the base, or of the adapter")
    parser.add_argument("--adapter", help="Hub id or folder of the adapter")
    parser.add_argument("--output", type=Path, help="where to write the JSON document")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures")
    parser.add_argument("--at", type=int, default=30, help="tokens on the page when a picture is taken (%(default)s)")
    parser.add_argument("--presses", type=int, default=10, help="presses on each window (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each race is run (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a race that is timed (%(default)s)")
    return parser.parse_args()


def open_page(browser: Browser, url: str, window: str) -> Page:
    """The page of the demo in a window."""
    width, height, scheme = WINDOWS[window]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.wait_for_selector("#race-start:enabled")
    return page


def first_token(page: Page, presses: int) -> dict:
    """Seconds from the press to the first token, and the server's processor time meanwhile."""
    wall, cpu = [], []
    for number in range(presses):
        page.locator("#race-prompt textarea").fill(PROMPTS[number % len(PROMPTS)])
        before = time.process_time()
        wall.append(page.evaluate(PRESS) / 1000)
        cpu.append(time.process_time() - before)
        print(f"first token after {wall[-1]:.2f} s, {cpu[-1]:.2f} s of the processor", flush=True)
        page.click("#race-stop")
        page.wait_for_selector("#race-start:enabled")
    return {name: _summary(values) for name, values in (("seconds", wall), ("processor_seconds", cpu))}


def _summary(values: list[float]) -> dict:
    return {
        "least": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "most": round(max(values), 3),
        "presses": len(values),
    }


def fairness(track: RaceTrack, rounds: int, new_tokens: int) -> Iterator[dict]:
    """By side: seconds by its clock in a race, divided by seconds alone; the median of the prompts so far.

    The least of the rounds counts for each prompt.
    """
    ratios: dict[str, list[float]] = {"plain": [], "mtp": []}
    for prompt in PROMPTS:
        settings = RaceSettings(prompt, new_tokens, track.k, bitwise=track.defaults("", 1).bitwise)
        raced, alone = {"plain": [], "mtp": []}, {"plain": [], "mtp": []}
        for _ in range(rounds):
            for side, seconds in _alone(track, settings).items():
                alone[side].append(seconds)
            frame = [*track.run(settings)][-1]
            for side in raced:
                raced[side].append(getattr(frame, side).seconds)
        for side, values in ratios.items():
            values.append(min(raced[side]) / min(alone[side]))
            print(f"{side}: {values[-1]:.2f} times as long in the race, by its own clock", flush=True)
        yield {side: round(statistics.median(values), 3) for side, values in ratios.items()}


def _alone(track: RaceTrack, settings: RaceSettings) -> dict[str, float]:
    """Seconds that `generate` takes for each side without a race."""
    seconds = {}
    for side, call in zip(("plain", "mtp"), track.calls(settings), strict=True):
        start = time.perf_counter()
        track.compute(call)
        seconds[side] = time.perf_counter() - start
    return seconds


def take_picture(page: Page, path: Path, tokens: int) -> None:
    """A picture of the page when so many tokens are on it."""
    page.locator("#race-prompt textarea").fill(PROMPTS[0])
    page.get_by_role("button", name="Race").click()
    page.wait_for_function(
        f"document.querySelectorAll('.race-text.mtp .own, .race-text.mtp .kept').length >= {tokens}"
        " && document.querySelector('.race-text.mtp del') && document.querySelector('.race-text.mtp .draft')"
    )
    page.screenshot(path=path, full_page=True)
    page.click("#race-stop")
    page.wait_for_selector("#race-start:enabled")


def in_browser(demo: Demo, args: argparse.Namespace) -> dict:
    """The first tokens on each window; takes the pictures, too."""
    options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"] if os.geteuid() == 0 else []}
    measured = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        for window in WINDOWS:
            page = open_page(browser, demo.url, window)
            measured[window] = first_token(page, args.presses)
            if args.screenshots:
                args.screenshots.mkdir(parents=True, exist_ok=True)
                take_picture(page, args.screenshots / f"demo_{window}.png", args.at)
            page.close()
        browser.close()
    return measured


def main() -> None:
    args = parse_args()
    print("Loading the model.", flush=True)
    demo = Demo(DemoSettings(args.base, args.adapter, port=0))
    threading.Thread(target=demo.run, daemon=True).start()
    model = demo.track.model
    report = {
        "base": demo.name,
        "adapter": adapter_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": describe_machine(),
        "load_average": round(os.getloadavg()[0], 1),
        "first_token": in_browser(demo, args),
        "new_tokens": args.new_tokens,
    }
    demo.stop()
    save(report, args.output)
    for ratios in fairness(demo.track, args.rounds, args.new_tokens):
        report["seconds_in_race_over_alone"] = ratios
        save(report, args.output)
    finish(report, args.output)


if __name__ == "__main__":
    main()
