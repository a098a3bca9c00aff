"""`teasr drift`: its answer in the terminal, by exit code, and on a page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from jobs.drift import Drifted, ago, page
from teasr.drift import COMPARED, SIZES, Inputs, Reference, compare
from teasr.errors import UsageError
from tests.browser import chromium

NOW = datetime(2020, 11, 28, 12, tzinfo=UTC)


def figures(count: int, seed: int, noise: float = 4) -> dict[str, list[float]]:
    random = np.random.default_rng(seed)
    means = {"noise": noise, "sharpness": 0.4, "brightness": 120, "contrast": 50}
    found = {name: [*random.normal(mean, mean / 5, count)] for name, mean in means.items()}
    found |= {name: [*random.integers(200, 900, count).astype(float)] for name in SIZES}
    return found | {"jpeg_quality": [*random.integers(60, 96, count).astype(float)]}


def record(path: Path, found: dict[str, list[float]]) -> Path:
    rows = [dict(zip(found, values)) for values in zip(*found.values())]
    path.write_text("".join(json.dumps({"at": NOW.isoformat(), **row}) + "\n" for row in rows))
    return path


def test_the_answer_is_in_the_exit_code(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    good = record(tmp_path / "good.jsonl", figures(300, 0))
    same = record(tmp_path / "same.jsonl", figures(200, 1))
    worse = record(tmp_path / "worse.jsonl", figures(200, 2, noise=7))
    against = ("--reference", str(good))
    code, out, _ = run("drift", "teasr", "--inputs", str(same), *against)
    assert code == 0 and "no drift in 200 pictures" in out
    written = ("--out", str(tmp_path / "page.html"))
    code, out, err = run("drift", "teasr", "--inputs", str(worse), *against, *written)
    assert code == 1 and "The inputs of 'teasr' drifted: noise." in err
    assert "noise" in out and "< 0.0001" in out
    assert (tmp_path / "page.html").read_text().count("<svg") == len(COMPARED) + len(SIZES)
    code, _, err = run("drift", "teasr", "--inputs", str(same), *against, "--since", "1m")
    assert code == 2 and "0 pictures are too few" in err
    code, _, err = run("drift", "teasr", "--inputs", str(same))
    assert code == 2 and "No model 'teasr' is registered" in err
    code, _, err = run("drift", "teasr")
    assert code == 2 and "no recorded inputs" in err and "home/inputs/teasr.jsonl" in err


def test_how_far_to_look_back() -> None:
    assert ago("7d", NOW) == NOW - timedelta(days=7)
    assert ago("90m", NOW) == NOW - timedelta(minutes=90)
    for text in ("7", "d", "-1d", "1.5h", "999999w"):
        with pytest.raises(UsageError, match="--since"):
            ago(text, NOW)


def test_the_page_shows_both_distributions(tmp_path: Path) -> None:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium is installed")
    reference = Reference(figures(500, 0), "windows of <b>33</b> photographs")
    inputs = Inputs(figures(200, 2, noise=7), 200, NOW - timedelta(days=7), NOW)
    result = Drifted("teasr", "teasr version 3", reference, inputs, compare(reference, inputs))
    (tmp_path / "drift.html").write_text(page(result))
    with chromium(program, tmp_path / "profile") as browser:
        browser.open(tmp_path / "drift.html", width=400)
        assert browser.run("document.documentElement.scrollWidth") <= 400
        browser.open(tmp_path / "drift.html")
        assert browser.run("document.querySelector('dd').textContent") == "drift in noise"
        assert browser.run("document.querySelectorAll('b').length") == 0
        drawn = browser.run(
            "[...document.querySelectorAll('svg')].map(s => s.querySelectorAll('.curve').length)"
        )
        assert drawn == [4] * (len(COMPARED) + len(SIZES))  # two outlines and their keys
        box = browser.run(
            "(([a, b]) => a.top < b.bottom && b.top < a.bottom && a.left < b.right)"
            "([...document.querySelectorAll('svg polyline')].map(p => p.getBoundingClientRect()))"
        )
        assert box
        (tmp_path / "drift.png").write_bytes(browser.screenshot(whole=True))
