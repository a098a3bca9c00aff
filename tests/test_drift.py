"""Drift: figures of known pictures, a bounded record, and alarms only where something changed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from teasr.degradation import Degradation
from teasr.drift import (
    COMPARED,
    DriftSettings,
    InputRecorder,
    Inputs,
    Reference,
    compare,
    describe,
    looks,
    noise,
    read_inputs,
    stability_index,
)
from teasr.errors import TeasrError, UsageError
from teasr.images import decode, encode

Pictures = Sequence[NDArray[np.uint8]]


@pytest.mark.parametrize("sigma", [0.5, 1, 3, 8, 20])
def test_noise_is_what_was_added(sigma: float) -> None:
    random = np.random.default_rng(0)
    even = np.full((128, 128), 128.0)
    edges = np.where(np.arange(128) // 16 % 2, 180.0, 60.0)[:, None] + np.linspace(0, 9, 128)
    for picture in (even, edges):
        noisy = (picture + random.normal(0, sigma, picture.shape)).clip(0, 255).round()
        rounded = np.sqrt(sigma**2 + 1 / 12)
        assert noise(noisy.astype(np.uint8)) == pytest.approx(rounded, rel=0.06)


def test_a_picture_without_noise_has_next_to_none() -> None:
    assert noise(np.full((128, 128), 7, np.uint8)) < 0.1
    assert noise(np.zeros((2, 200), np.uint8)) == 0


def test_figures_do_not_depend_on_the_size(photo: Callable[..., NDArray[np.uint8]]) -> None:
    random = np.random.default_rng(1)
    large = (128 + random.normal(0, 5, (700, 900, 3))).clip(0, 255).astype(np.uint8)
    whole = describe(encode(large, "jpeg", quality=80), large)
    assert whole["noise"] == pytest.approx(looks(large)["noise"], rel=0.1)
    assert (whole["width"], whole["height"], whole["megapixels"]) == (900, 700, 0.63)
    assert whole["jpeg_quality"] == 80
    assert "jpeg_quality" not in describe(encode(large), large)
    assert describe(encode(large[:1, :1]), large[:1, :1])["contrast"] == 0


# ---------------------------------------------------------------- the record


def test_many_threads_and_processes_write_whole_lines(
    tmp_path: Path, photo: Callable[..., NDArray[np.uint8]]
) -> None:
    path = tmp_path / "inputs" / "teasr.jsonl"
    program = (
        "import sys; from pathlib import Path; import numpy as np;"
        "from teasr.drift import InputRecorder; from teasr.images import encode;"
        "rgb = np.full((40, 40, 3), 9, np.uint8); r = InputRecorder(Path(sys.argv[1]));"
        "[r.add(encode(rgb), rgb) for _ in range(40)]"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(path)])
    recorder = InputRecorder(path)
    rgb = photo(50, 60)
    encoded = encode(rgb)
    threads = [
        threading.Thread(target=lambda: [recorder.add(encoded, rgb) for _ in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.wait(60) == 0
    for line in path.read_text().splitlines():
        json.loads(line)
    found = read_inputs(path)
    assert found.pictures == 120 and sorted(set(found.figures["width"])) == [40, 60]
    assert [file.name for file in path.parent.iterdir() if "pictures" in file.name] == []


def test_the_record_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    recorder = InputRecorder(tmp_path / "x.jsonl", keep_pictures=3, turn_bytes=2000)
    for value in range(60):
        rgb = np.full((8, 8, 3), value, np.uint8)
        recorder.add(encode(rgb), rgb)
    files = [tmp_path / "x.jsonl", tmp_path / "x.jsonl.1"]
    assert all(0 < file.stat().st_size <= 2000 for file in files)
    found = read_inputs(tmp_path / "x.jsonl")
    assert found.figures["brightness"] == [*range(60 - found.pictures, 60)]
    kept = [decode(file.read_bytes()).rgb[0, 0, 0] for file in (tmp_path / "x.pictures").iterdir()]
    assert sorted(kept) == [57, 58, 59]


def test_broken_lines_and_old_ones_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    now = datetime.now(UTC)
    lines = [
        json.dumps({"at": (now - timedelta(days=9)).isoformat(), "noise": 1}),
        json.dumps({"at": now.isoformat(), "noise": 2}),
        '{"at": "2026-',
        "[]",
        json.dumps({"at": now.isoformat(), "noise": None}),
    ]
    path.write_text("\n".join(lines))
    assert read_inputs(path).figures == {"noise": [1, 2]}
    recent = read_inputs(path, now - timedelta(days=7))
    assert (recent.pictures, recent.first, recent.last) == (1, now, now)
    with pytest.raises(UsageError, match="no recorded inputs"):
        read_inputs(tmp_path / "none.jsonl")


# ---------------------------------------------------------------- the comparison


def test_stability_index_in_closed_form() -> None:
    reference = np.arange(1000.0)
    assert stability_index(reference, reference) == pytest.approx(0)
    # All in the upper half: five tenths with 0.2 for 0.1 each, five nearly empty.
    upper = np.repeat(np.arange(500.0, 1000), 2)
    empty, full, tenth = 0.5 / 1005, 200.5 / 1005, 100.5 / 1005
    expected = 5 * (empty - tenth) * np.log(empty / tenth)
    expected += 5 * (full - tenth) * np.log(full / tenth)
    assert stability_index(reference, upper) == pytest.approx(expected)


@pytest.fixture(scope="module")
def pictures(photo: Callable[..., NDArray[np.uint8]]) -> Pictures:
    """500 low-resolution pictures by one degradation."""
    degrade = Degradation("teasr", seed=5)
    return [degrade(photo(128, 128, seed), f"p{seed}").lr for seed in range(500)]


def figures(pictures: Pictures, quality: int | None = None) -> list[dict[str, float]]:
    random = np.random.default_rng(3)
    found = []
    for rgb in pictures:
        encoded = encode(rgb, "jpeg", quality=quality or int(random.integers(60, 96)))
        found.append(describe(encoded, decode(encoded).rgb if quality else rgb))
    return found


def columns(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_alarms_when_nothing_changed_are_rarer_than_one_in_a_hundred(pictures: Pictures) -> None:
    found = figures(pictures)
    alarms = 0
    for seed in range(200):
        order = np.random.default_rng(seed).permutation(len(found))
        reference = Reference(columns([found[i] for i in order[:300]]), "")
        inputs = Inputs(columns([found[i] for i in order[300:]]), 200)
        differences = compare(reference, inputs)
        assert [d.figure for d in differences[:5]] == list(COMPARED)
        alarms += any(d.drifted for d in differences)
    assert alarms < 2


def test_stronger_noise_and_lower_quality_are_found(pictures: Pictures) -> None:
    reference = Reference(columns(figures(pictures[:300])), "")
    rest = pictures[300:]
    random = np.random.default_rng(0)
    noisy = [(p + random.normal(0, 15, p.shape)).clip(0, 255).astype(np.uint8) for p in rest]

    def drifted(rows: list[dict[str, float]]) -> set[str]:
        found = compare(reference, Inputs(columns(rows), len(rows)))
        return {difference.figure for difference in found if difference.drifted}

    assert drifted(figures(rest)) == set()
    assert "noise" in drifted(figures(noisy))
    assert "jpeg_quality" in drifted(figures(rest, quality=30))
    darker = [(p * 0.5).astype(np.uint8) for p in rest]
    assert {"brightness", "contrast"} <= drifted(figures(darker))


def test_too_few_pictures_are_told() -> None:
    reference = Reference({"noise": [1.0] * 500}, "")
    with pytest.raises(UsageError, match="20 pictures are too few to compare: 50 are needed"):
        compare(reference, Inputs({"noise": [1.0] * 20}, 20))
    few = compare(reference, Inputs({"noise": [1.0] * 20}, 20), DriftSettings(pictures=20))
    assert [d.figure for d in few] == ["noise"] and not few[0].drifted


def test_a_reference_is_read_back() -> None:
    reference = Reference({"noise": [0.1, 2.0]}, "two windows")
    assert Reference.from_json(reference.to_json()) == reference
    for text in ("", "[]", '{"figures": {"noise": ["a"]}, "about": ""}'):
        with pytest.raises(TeasrError, match="not a drift reference"):
            Reference.from_json(text)
