"""The page at `/` in a real browser, against a real server."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from teasr.images import bicubic_upsample, decode, encode
from tests.browser import Browser, chromium
from tests.server.conftest import Running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.journey,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
]
DONE = "!document.querySelector('#view').classList.contains('waiting') && !asking"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with chromium(CHROMIUM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def photograph(tmp_path: Path, photo: Callable[..., NDArray[np.uint8]]) -> Path:
    file = tmp_path / "my photograph.png"
    file.write_bytes(encode(photo(100, 140)))
    return file


def seen(browser: Browser) -> NDArray[np.int16]:
    """The pixels of the picture in the window."""
    left, top, width, height = (round(number) for number in browser.box("#view"))
    shot = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    return np.asarray(shot.crop((left, top, left + width, top + height))).astype(np.int16)


def test_a_person_restores_a_photograph(
    browser: Browser, server: Running, photograph: Path
) -> None:
    browser.open(f"{server.url}/", height=1000)
    browser.wait("document.querySelector('#version').textContent != ''")
    assert browser.run("document.querySelector('#go').disabled")
    browser.choose("#file", photograph)
    browser.wait(DONE)
    facts = browser.run("document.querySelector('#facts').textContent")
    assert "560 × 400 pixels in" in facts and "1 step, seed 0" in facts
    name = browser.run("document.querySelector('#download').download")
    assert name == "my photograph-restored.png"
    encoded = browser.run(
        "fetch('restore?steps=1&seed=0', {method: 'POST', body: photograph}).then(a => a.blob())"
        ".then(b => b.arrayBuffer()).then(a => Array.from(new Uint8Array(a)))"
    )
    restored = decode(bytes(encoded)).rgb

    # In its actual size the left half is the photograph, the right half what the server made.
    browser.click("#actual")
    picture = seen(browser)
    height, width = picture.shape[:2]
    assert (width, height) == (560, 400)
    rows, left, right = slice(60, 150), slice(20, 230), slice(330, 540)
    before = bicubic_upsample(decode(photograph.read_bytes()).rgb)
    assert np.abs(picture[rows, right] - restored[rows, right]).max() <= 1
    assert np.abs(picture[rows, left] - before[rows, left]).mean() < 4

    # With the keyboard: all the way to either side.
    browser.run("document.querySelector('#slider').focus()")
    browser.press("Home")
    assert np.abs(seen(browser)[rows, left] - restored[rows, left]).max() <= 1
    browser.press("End")
    assert np.abs(seen(browser)[rows, right] - before[rows, right]).mean() < 4
    browser.press("ArrowLeft")
    assert browser.run("document.querySelector('#slider').value") == "99"

    # With the pointer.
    x, y, width, height = browser.box("#view")
    browser.drag((x + width / 2, y + height / 2), (x + width / 4, y + height / 2))
    assert abs(float(browser.run("document.querySelector('#slider').value")) - 25) <= 2

    browser.run(
        "(s => { s.value = 3; s.dispatchEvent(new Event('input')); })"
        "(document.querySelector('#steps'))"
    )
    assert browser.run("document.querySelector('#count').textContent") == "3"
    browser.click("#go")
    browser.wait("document.querySelector('#facts').textContent.includes('3 steps')")
    assert browser.run("document.querySelector('#error').hidden")


def test_mistakes_are_told(browser: Browser, server: Running, tmp_path: Path) -> None:
    browser.open(f"{server.url}/")
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    browser.choose("#file", text)
    browser.wait("!document.querySelector('#error').hidden")
    told = browser.run("document.querySelector('#error').textContent")
    assert told.startswith("The file is not a picture of a known format.")
    large = tmp_path / "large.png"
    large.write_bytes(encode(np.zeros((200, 200, 3), np.uint8)))
    browser.choose("#file", large)
    browser.wait("document.querySelector('#error').textContent.includes('40,000 pixels')")


def test_the_page_is_kept_to_itself_and_can_be_used_by_everybody(
    browser: Browser, server: Running
) -> None:
    browser.open(f"{server.url}/", width=400)
    assert browser.run("document.documentElement.scrollWidth") <= 400
    unnamed = browser.run(
        "[...document.querySelectorAll('input, button, img, a')].filter(e => !(e.labels?.length || "
        "e.ariaLabel || e.alt || e.textContent.trim())).map(e => e.id)"
    )
    assert unnamed == []
    refused = browser.run(
        "new Promise(done => { document.addEventListener('securitypolicyviolation', "
        "e => done(e.effectiveDirective)); const s = document.createElement('script'); "
        "s.textContent = 'window.taken = 1'; document.body.append(s); })"
    )
    assert refused.startswith("script-src") and browser.run("window.taken === undefined")
    assert json.loads(server.ask("GET", "/version").body)["version"]
