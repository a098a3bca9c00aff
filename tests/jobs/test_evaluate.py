"""What is shown of an evaluation: the table, and the page as a person uses it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from jobs.evaluate import checked_metrics, draw_page, draw_sheet
from jobs.figures import table
from pipelines.benchmark import BenchmarkResult, Comparison
from teasr.errors import UsageError
from teasr.evaluation import DEFAULT_METRICS, METRICS, Evaluation
from teasr.images import encode
from teasr.metrics import Scores
from teasr.no_reference import measure
from tests.browser import Browser, chromium

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
COLOURS = {
    "bicubic": (255, 0, 0), "1 step": (0, 255, 0), "4 steps": (0, 0, 255), "original": (255, 255, 0)
}  # fmt: skip
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


def flat(colour: tuple[int, int, int], height: int = 400, width: int = 500) -> bytes:
    return encode(np.full((height, width, 3), colour, np.uint8))


def evaluation(metrics: tuple[str, ...] = ("psnr_y", "ssim_y", "niqe"), pictures: int = 3):
    """The last picture is the worst."""

    def scores(rise: float, i: int) -> Scores:
        figures = {"psnr_y": 25 + rise - i, "ssim_y": 0.7 + rise / 100, "musiq": 50.0 + i}
        return Scores(**{name: figures.get(name, 0.31234 + rise / 10 + i) for name in metrics})

    keys = ["first", "<second>", HOSTILE][:pictures]
    systems = {"bicubic": 0.0, "1 step": 1.0, "4 steps": 0.5}
    found = {
        system: {key: scores(rise, i) for i, key in enumerate(keys)}
        for system, rise in systems.items()
    }
    return Evaluation("fingerprint", found, {"bicubic": 0.04, "1 step": 11.5, "4 steps": 40.25})


def result() -> BenchmarkResult:
    """Every system's pictures are of one colour."""
    found = evaluation()
    pictures = [
        Comparison(
            key,
            flat((9, 9, 9), 100, 125),
            {system: flat(COLOURS[system]) for system in found.scores},
            flat(COLOURS["original"]),
        )
        for key in found.scores["bicubic"]
    ]
    return BenchmarkResult(found, pictures)


def drawn(found: Evaluation, width: int = 100) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(table(found, "title"))
    return text.getvalue()


def test_the_table_has_means_over_intervals() -> None:
    found = evaluation()
    low, high = found.interval("1 step", "psnr_y") or (0, 0)
    text = drawn(found)
    assert "25.00" in text and f"{low:.1f}–{high:.1f}" in text
    assert "11.50" in text
    assert "Not measured: LPIPS, DISTS." in text


def test_the_table_of_the_usual_metrics_fits_100_columns() -> None:
    found = evaluation(DEFAULT_METRICS)
    wide, narrow = ([line.rstrip() for line in drawn(found, n).splitlines()] for n in (200, 100))
    assert narrow == wide


def test_a_picture_restored_without_error_has_no_interval() -> None:
    scores = {"bicubic": {"a": Scores(float("inf"), 1.0), "b": Scores(30.0, 0.9)}}
    text = drawn(Evaluation("x", scores))
    assert " inf " in text and "nan" not in text and "0.900–1.000" in text


def test_metrics_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked_metrics("psnr_y, niqe") == ("psnr_y", "niqe")
    with pytest.raises(UsageError, match=r"no metric 'lpip'.*lpips, dists"):
        checked_metrics("psnr_y,lpip")
    monkeypatch.setattr("jobs.evaluate.has_pyiqa", lambda: False)
    with pytest.raises(
        UsageError, match=r"which measures musiq, clipiqa, is not.*pip install pyiqa"
    ):
        checked_metrics("musiq,niqe,clipiqa")
    monkeypatch.setattr("jobs.evaluate.has_pyiqa", lambda: True)
    assert checked_metrics(",".join(METRICS)) == tuple(METRICS)


def test_pyiqa_gets_batches_in_unit_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: its metrics are callables of (N, 3, H, W) in [0, 1]."""
    seen = []
    module = ModuleType("pyiqa")

    def create_metric(name: str, device: str):  # type: ignore[no-untyped-def]
        def metric(batch: torch.Tensor) -> torch.Tensor:
            seen.append((name, device, tuple(batch.shape), batch.dtype))
            return batch.max() + torch.rand(1)

        return metric

    module.create_metric = create_metric  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    figure = measure("maniqa")
    white = np.full((224, 230, 3), 255, np.uint8)
    first = figure(white)
    assert first is not None and 1 <= first < 2 and figure(white) == first
    assert seen[0] == ("maniqa", "cpu", (1, 3, 224, 230), torch.float32)
    assert figure(white[1:]) is None


def test_the_sheet_shows_some_of_many(tmp_path: Path) -> None:
    found = result()
    draw_sheet(found, tmp_path / "few.png")
    found.pictures = found.pictures * 6
    draw_sheet(found, tmp_path / "many.png")
    few, many = (Image.open(tmp_path / f"{name}.png").height for name in ("few", "many"))
    assert few < many < 3 * few


def test_the_page_holds_the_table_and_the_worst_picture_first() -> None:
    text = draw_page(result(), HOSTILE)
    assert "<img src=x" not in text and "http" not in text.replace("http-equiv", "")
    assert text.index("&lt;img src=x", text.index("<main")) < text.index("<h3>&lt;second")
    assert text.index("<h3>&lt;second") < text.index("<h3>first")
    assert "<dd>LPIPS, DISTS</dd>" in text and "10,000 bootstrap" in text
    found = result()
    found.pictures = []
    assert "<main" not in draw_page(found, "none")


def test_the_page_shows_the_middle_of_a_large_picture() -> None:
    found = result()
    large = np.zeros((1000, 300, 3), np.uint8)
    large[116:884] = 255
    system = found.pictures[0].restored
    found.pictures = [Comparison("first", b"", dict.fromkeys(system, encode(large)), encode(large))]
    text = draw_page(found, "large")
    assert "the middle 300 × 768 of 300 × 1000" in text and "aspect-ratio:300/768" in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with chromium(CHROMIUM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def colours_seen(browser: Browser, box: tuple[float, float, float, float]) -> dict[str, float]:
    """The share of a box of the window that has each system's colour."""
    left, top, width, height = (round(number) for number in box)
    shot = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    pixels = np.asarray(shot.crop((left, top, left + width, top + height)))
    return {
        name: float((pixels == colour).all(axis=2).mean())
        for name, colour in COLOURS.items()
        if (pixels == colour).all(axis=2).mean() > 0.02
    }


def test_a_person_compares_any_two_systems(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    page.write_text(draw_page(result(), "look"))
    browser.open(page)
    assert browser.run("document.title") == "look" and browser.run("document.images.length") == 12
    box = browser.box(".stack")
    seen = colours_seen(browser, box)
    half = pytest.approx(0.5, abs=0.03)
    assert seen == {"bicubic": half, "1 step": half}

    left, top, width, height = box
    middle = top + height / 2
    browser.drag((left + width / 2, middle), (left + width / 4, middle))
    seen = colours_seen(browser, box)
    quarter, rest = pytest.approx(0.25, abs=0.03), pytest.approx(0.75, abs=0.03)
    assert seen == {"bicubic": quarter, "1 step": rest}

    browser.click(".choice [data-side=left][value='4 steps']")
    browser.click(".choice [data-side=right][value=original]")
    seen = colours_seen(browser, browser.box(".stack"))
    assert set(seen) == {"4 steps", "original"}
    tags = browser.run("[...document.querySelectorAll('.stack .tag')].map(t => t.textContent)")
    assert tags == ["4 steps", "original"] * 3
    pressed = browser.run("[...document.querySelectorAll('[aria-pressed=true]')].map(b => b.value)")
    assert pressed == ["4 steps", "original"]

    browser.click(".choice [data-side=left][value=original]")  # the same at both sides
    assert set(colours_seen(browser, browser.box(".stack"))) == {"original"}


def test_the_page_fits_a_narrow_window(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "narrow.html"
    page.write_text(draw_page(result(), "narrow"))
    browser.open(page, width=400)
    assert browser.run("document.documentElement.scrollWidth") <= 400
    _, _, width, height = browser.box(".stack")
    assert width < 360 and width / height == pytest.approx(500 / 400, rel=0.02)


def test_the_json_has_what_the_table_shows() -> None:
    found = evaluation()
    document = json.loads(found.to_json())["intervals"]["1 step"]
    assert set(document) == set(found.measured()) == {"psnr_y", "ssim_y", "niqe"}
