"""The demo in a browser: headless Chromium, on a wide and on a narrow window, with the mouse and with the keyboard."""

import os
import shutil
import threading
import time

import pytest
from tiny_models import tiny_base, upgraded
from tiny_text import tiny_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed", allow_module_level=True)
pytest.importorskip("gradio", reason="needs hf_mtp[demo]")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

from hf_mtp.demo.app import Demo, DemoSettings  # noqa: E402

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
PATIENCE = 60_000  # milliseconds, for machines that are busy
FINISHED = "document.querySelectorAll('.race-done').length == 2"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The page of a tiny model."""
    folder = tmp_path_factory.mktemp("demo")
    base = tiny_base("llama", max_position_embeddings=1024)
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    upgraded(base, 3).save_pretrained(folder / "adapter")
    demo = Demo(DemoSettings(str(folder / "base"), str(folder / "adapter"), port=0))
    thread = threading.Thread(target=demo.run)
    thread.start()
    yield demo
    demo.stop()
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page_of(demo, browser):
    """Opens the page; what the browser complains about fails the test."""
    pages = []

    def open_page(viewport: dict = WIDE, **options):
        page = browser.new_page(viewport=viewport, **options)
        page.set_default_timeout(PATIENCE)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(demo.url)
        page.wait_for_selector("#race-start")
        page.locator("#race-prompt textarea").fill("w6 w9")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        assert not page.errors
        page.close()


def status(page) -> str:
    return page.inner_text("#race-status [role=status][aria-live=polite]")


def texts(page) -> list[str]:
    return [page.inner_text(f".race-text.{side} p").strip() for side in ("plain", "mtp")]


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_a_race_from_start_to_end(page_of, viewport):
    page = page_of(viewport)
    page.eval_on_selector("#race-status [role=status]", "element => element.dataset.seen = 'yes'")
    assert "Press “Race”" in status(page)
    page.get_by_role("button", name="Race").click()
    page.wait_for_function(FINISHED)
    page.wait_for_function("document.querySelector('#race-status').innerText.includes('token for token')")
    one, two = texts(page)
    assert one == two != ""
    # A screen reader follows this element, so it must be the same one as before.
    assert page.get_attribute("#race-status [role=status]", "data-seen") == "yes"
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    page.get_by_text("passes of multi-token prediction").click()
    assert page.locator(".race-passes tbody tr").first.is_visible()
    boxes = [page.locator(f".race-text.{side}").bounding_box() for side in ("plain", "mtp")]
    is_side_by_side = boxes[0]["y"] == boxes[1]["y"]
    assert is_side_by_side == (viewport is WIDE)


def test_drafts_appear_before_they_are_decided(page_of):
    page = page_of()
    page.get_by_label("Strategy").click()
    page.get_by_role("option", name="quadratic").click()
    page.get_by_label("Slow motion").check()
    page.get_by_role("button", name="Race").click()
    page.wait_for_selector(".race-text.mtp .draft")
    page.wait_for_selector(".race-text.mtp del")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function("document.querySelector('#race-status').innerText.includes('Stopped')")


def test_stop_ends_the_race_and_the_next_one_runs(page_of, demo):
    page = page_of()
    page.get_by_label("Slow motion").check()
    page.get_by_role("button", name="Race").click()
    page.wait_for_selector(".race-text.plain .own")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function("document.querySelector('#race-status').innerText.includes('Stopped')")
    _wait_until_nobody_races(demo)
    shown = texts(page)
    page.wait_for_timeout(1000)
    assert texts(page) == shown
    page.get_by_label("Slow motion").uncheck()
    page.get_by_role("button", name="Race").click()
    page.wait_for_function(FINISHED)


def test_a_press_right_after_stop_counts(page_of):
    page = page_of()
    slow = page.get_by_label("Slow motion")
    slow.check()  # else a race may be finished before it is stopped
    for is_last in (False, True):
        page.get_by_role("button", name="Race").click()
        page.wait_for_selector(".race-text.plain .own")
        if is_last:
            slow.uncheck()
        page.get_by_role("button", name="Stop").click()
        page.wait_for_selector("#race-start:enabled")
    page.get_by_role("button", name="Race").click()
    page.wait_for_function(FINISHED)


def test_closing_the_window_ends_the_race(page_of, browser, demo):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(demo.url)
    page.get_by_label("Slow motion").check()
    page.get_by_role("button", name="Race").click()
    page.wait_for_selector(".race-text.plain .own")
    page.close()
    _wait_until_nobody_races(demo)


def _wait_until_nobody_races(demo: Demo) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while demo.track.is_racing:
        assert time.monotonic() < end, "the race goes on"
        time.sleep(0.1)


def test_the_keyboard_is_enough(page_of):
    page = page_of()
    page.locator("#race-prompt textarea").focus()
    page.keyboard.press("Shift+Enter")
    page.wait_for_function(FINISHED)
    page.get_by_role("button", name="Race").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('.race-done').length == 0")
    page.wait_for_function(FINISHED)
    page.locator(".race-passes summary").focus()
    page.keyboard.press("Enter")
    assert page.locator(".race-passes tbody tr").first.is_visible()


def test_both_sides_sample_one_text_and_the_seed_changes_it(page_of):
    page, seen = page_of(), []
    page.get_by_label("number input for Temperature").fill("1")
    for seed in ("1", "2"):
        page.get_by_label("Seed").fill(seed)
        page.get_by_label("Seed").blur()
        page.get_by_role("button", name="Race").click()
        page.wait_for_function("document.querySelectorAll('.race-done').length == 0")
        page.wait_for_function(FINISHED)
        one, two = texts(page)
        assert one == two
        seen.append(one)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("text, message", [(" ", "The prompt is empty"), ("w6 " * 1000, "supports at most 1024")])
def test_wrong_input_is_said(page_of, text, message):
    page = page_of()
    page.locator("#race-prompt textarea").fill(text)
    page.get_by_role("button", name="Race").click()
    page.wait_for_selector(".race-alert")
    assert message in status(page)
    assert page.get_by_role("button", name="Race").is_enabled()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_can_be_read(page_of, scheme):
    """WCAG AA: 4.5 to 1."""
    page = page_of(color_scheme=scheme)
    page.wait_for_function(f"document.body.classList.contains('dark') == {str(scheme == 'dark').lower()}")
    for selector in (".kept", ".draft", "del", ".race-track dt", ".race-empty", ".race-text h4", "#race-status p"):
        assert page.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector


CONTRAST = """element => {
  const parse = color => {
    const context = document.createElement('canvas').getContext('2d');
    context.fillStyle = color; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const mix = (top, below, alpha) => top.map((value, i) => value * alpha + below[i] * (1 - alpha));
  const luminance = rgb => rgb.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let back = null, opacity = 1;
  for (let node = element; node; node = node.parentElement) {
    opacity *= getComputedStyle(node).opacity;
    const color = parse(getComputedStyle(node).backgroundColor);
    if (back === null && color[3] === 255) back = color;
  }
  const front = mix(parse(getComputedStyle(element).color), back, opacity);
  const [high, low] = [luminance(front), luminance(back)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}"""
