"""The whole journey through the real Ray, DeepSpeed and MLflow, on tiny settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from teasr.images import decode, encode
from tests.jobs.commands import TINY, teasr

pytestmark = pytest.mark.journey


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., np.ndarray]) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(8):
        (folder / f"p{i}.jpg").write_bytes(encode(photo(90 + i, 100, seed=i), "jpeg"))
    (folder / "broken.jpg").write_bytes((folder / "p1.jpg").read_bytes()[:400])
    (folder / "tiny.png").write_bytes(encode(photo(20, 20)))
    return folder


def test_quickstart_twice_then_every_command(photos: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    given = ["--photos", str(photos), "--dir", str(home), *TINY, "training.steps=3"]
    first = teasr("quickstart", *given, home=home)
    assert first.returncode == 0, first.stderr + first.stdout
    for part in ("quarantined", "champion", "answered over HTTP", "PSNR-Y", "4 steps", "next:"):
        assert part in first.stdout
    before, after = (
        decode((home / "pictures" / f"{n}.png").read_bytes()) for n in ("before", "after")
    )
    assert after.rgb.shape[0] == 4 * before.rgb.shape[0]
    assert not [path for path in home.rglob("*") if path.suffix in (".pkl", ".pickle")]
    reasons = [
        json.loads(line)["reason"]
        for name in ("train", "held-out")
        for line in (home / "data" / name / "quarantine.jsonl").read_text().splitlines()
    ]
    assert sorted(reasons) == ["too-small", "truncated"]

    again = teasr("quickstart", *given, home=home)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("as before") == 7

    picture = tmp_path / "odd.png"
    picture.write_bytes(encode(np.full((7, 41, 3), 80, np.uint8)))
    restored = teasr(
        "restore", "models:/teasr@champion", str(picture), str(tmp_path / "big.png"), home=home
    )
    assert restored.returncode == 0, restored.stderr
    assert decode((tmp_path / "big.png").read_bytes()).rgb.shape == (28, 164, 3)
    benchmark = str(home / "data" / "benchmark")
    out = str(tmp_path / "figures")
    measured = teasr(
        "evaluate",
        "models:/teasr/1",
        "--data",
        benchmark,
        "--steps",
        "1,2",
        "--out",
        out,
        home=home,
    )
    assert measured.returncode == 0 and "2 steps" in measured.stdout, measured.stderr
    assert {path.name for path in Path(out).iterdir()} == {
        "evaluation.json",
        "per-image.csv",
        "index.html",
        "sheet.png",
    }
