"""The command line: a user's mistake is one line, the right exit code, and nothing half written."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from teasr.images import bicubic_upsample, decode, encode

COMMANDS = [
    *("quickstart", "ingest", "synthesize", "distill", "evaluate", "promote", "rollback"),
    *("history", "serve", "restore", "retrain", "doctor"),
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(untrained: Path) -> str:
    return str(untrained)


def test_every_command_has_help(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in COMMANDS:
        assert name in out
        code, text, _ = run(name, "--help")
        assert code == 0 and "Usage" in text


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["ingest", "missing", "out"], 2, "missing"),
        (["synthesize", "missing", "out"], 2, "teasr ingest"),
        (["distill", "nothing"], 2, "teasr-s-cpu"),
        (["distill", "quickstart", "engine.zero=3"], 2, "zero_stage"),
        (["distill", "quickstart"], 2, "Set data"),
        (["evaluate", "teasr-nothing", "--data", "x"], 2, "teasr-nothing"),
        (["evaluate", "teasr-s", "--data", "x", "--steps", "one"], 2, "whole numbers"),
        (["evaluate", "teasr-s", "--data", "x", "--metrics", "psnr"], 2, "clipiqa"),
        (["evaluate", "teasr-s", "--data", "x", "--metrics", "musiq"], 2, "pip install pyiqa"),
        (["evaluate", "teasr-s", "--data", "x", "--pictures", "-1"], 2, "or all"),
        (["evaluate", "teasr-s", "--data", "x", "--dists", "absent"], 2, "absent"),
        (["promote", "nobody"], 2, "nobody"),
        (["history", "nobody"], 2, "nobody"),
        (["rollback", "nobody"], 2, "nobody"),
        (["retrain", "quickstart"], 2, "photos"),
        (["quickstart", "--photos", "missing"], 2, "missing"),
        (["restore", "models:/teasr@champion", "a.png", "b.png"], 2, "teasr"),
    ],
)
def test_mistakes_are_told_in_one_line(
    run: Run, tmp_path: Path, arguments: list[str], code: int, told: str
) -> None:
    got, out, err = run(*arguments)
    assert got == code
    assert told in err and "Traceback" not in err + out
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.tar")) and not list(tmp_path.rglob("*.png"))


def test_restore_keeps_kind_and_size(
    run: Run, model: str, tmp_path: Path, photo: Callable[..., np.ndarray]
) -> None:
    rgb = photo(37, 23)
    cases = {
        "colour.jpg": encode(rgb, "jpeg"),
        "grey.png": encode(rgb, grey=True),
        "alpha.png": encode(rgb, alpha=np.full((37, 23), 99, np.uint8)),
    }
    for name, data in cases.items():
        Path(name).write_bytes(data)
        code, out, err = run("restore", model, name, f"big-{Path(name).stem}.png")
        assert code == 0, err
        assert "92 x 148" in out
        picture = decode((tmp_path / f"big-{Path(name).stem}.png").read_bytes())
        assert picture.rgb.shape == (148, 92, 3)
        assert picture.grey == (name == "grey.png")
        assert (picture.alpha is not None) == (name == "alpha.png")


def test_restore_respects_orientation(
    run: Run, model: str, tmp_path: Path, photo: Callable[..., np.ndarray]
) -> None:
    image = Image.fromarray(photo(20, 32))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: 32 x 20 stored, 20 x 32 seen
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert run("restore", model, "turned.jpg", "out.png")[0] == 0
    assert decode((tmp_path / "out.png").read_bytes()).rgb.shape == (128, 80, 3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["text.png", "out.png"], "text.png"),
        (["good.png", "out.gif"], ".webp"),
        (["good.png", "none/out.png"], "none"),
        (["good.png", "good.png"], "--overwrite"),
        (["alpha.png", "out.jpg"], "alpha"),
        (["missing.png", "out.png"], "missing.png"),
        (["good.png", "out.png", "--steps", "0"], "steps"),
        (["good.png", "out.png", "--colour", "blue"], "wavelet"),
        (["good.png", "out.png", "--tile", "4"], "greater than or equal to 8"),
        (["good.png", "out.png", "--tile", "9999"], "less than or equal to 1024"),
        (["cut.jpg", "out.png"], "cut off"),
        (["noise.png", "out.png"], "not a picture"),
        (["huge.png", "out.png"], "100000 x 100000"),
        (["long.png", "out.webp"], "16383"),
    ],
)
def test_restore_refuses_with_a_reason(
    run: Run, model: str, photo: Callable[..., np.ndarray], arguments: list[str], told: str
) -> None:
    Path("text.png").write_text("this is no picture")
    Path("good.png").write_bytes(encode(photo(20, 20)))
    Path("alpha.png").write_bytes(encode(photo(20, 20), alpha=np.zeros((20, 20), np.uint8)))
    Path("cut.jpg").write_bytes(encode(photo(40, 40), "jpeg")[:-200])
    Path("noise.png").write_bytes(np.random.default_rng(0).bytes(5000))
    Path("huge.png").write_bytes(_claiming(encode(photo(8, 8)), 100_000, 100_000))
    Path("long.png").write_bytes(encode(photo(1, 5000)))
    code, out, err = run("restore", model, *arguments)
    assert code in (1, 2)
    assert told in err and "Traceback" not in err + out
    assert not list(Path().glob("out.*"))


def _claiming(png: bytes, width: int, height: int) -> bytes:
    """The PNG with another size in its header."""
    size = struct.pack(">II", width, height)
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + size + png[24:29]))
    return png[:16] + size + png[24:29] + checksum + png[33:]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 10_000), (2000, 50)])
def test_restore_takes_any_extent(
    run: Run, model: str, photo: Callable[..., np.ndarray], height: int, width: int
) -> None:
    Path("in.png").write_bytes(encode(photo(height, width)))
    code, out, err = run("restore", model, "in.png", "out.png", "--tile", "96")
    assert code == 0, err
    assert f"{4 * width} x {4 * height}" in out
    restored = decode(Path("out.png").read_bytes()).rgb
    assert restored.shape == (4 * height, 4 * width, 3)
    # An untrained network is bicubic, but for its mirrored edges.
    exact = bicubic_upsample(photo(height, width)).astype(int)
    assert np.abs(restored - exact).mean() < 1


def test_port_in_use_is_told_before_anything_starts(run: Run, model: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = run("serve", model, "--port", port)
    assert code == 1 and port in err and len(err.strip().splitlines()) == 1


def test_an_absent_mlflow_server_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    code, _, err = run("history", "teasr")
    assert code == 1 and "does not answer" in err and "secret" not in err


def test_a_full_disk_is_told(model: str, tmp_path: Path, photo: Callable[..., np.ndarray]) -> None:
    """A small file system that is full, where the machine lets us mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs rights that this process has not")
    try:
        (tmp_path / "in.png").write_bytes(encode(photo(32, 32)))
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", "restore", model, "in.png", str(small / "out.png")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"TEASR_HOME": str(tmp_path / "home")},
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "space" in done.stderr and not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_doctor_looks_at_everything(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("doctor")
    assert code == 0, err
    for part in ("deepspeed", "opencv", "C++ compiler", "MLflow store", "LPIPS weights", "teasr-s"):
        assert part in out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, err = run("doctor")
    assert code == 1 and "does not answer" in out and len(err.strip().splitlines()) == 1


def test_dry_runs_write_nothing(run: Run, tmp_path: Path, photo: Callable[..., np.ndarray]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encode(photo(80, 80)))
    code, out, _ = run("ingest", "photos", "hr", "--dry-run")
    assert code == 0 and "1 of 1 shards" in out and "1 pictures have not been looked at" in out
    code, out, _ = run("distill", "quickstart", "data=hr", "--dry-run")
    assert code == 0 and "learning_rate" in out
    assert not (tmp_path / "hr").exists() and not (tmp_path / "home").exists()


@pytest.mark.usefixtures("ray_session")
def test_ingest_says_what_it_wrote_and_left_out(
    run: Run, tmp_path: Path, photo: Callable[..., np.ndarray]
) -> None:
    (tmp_path / "photos").mkdir()
    for name, seed in (("a", 1), ("b", 2), ("copy-of-b", 2)):
        (tmp_path / "photos" / f"{name}.png").write_bytes(encode(photo(80, 80, seed)))
    code, out, err = run("ingest", "photos", "hr")
    assert code == 0, err
    assert "2 samples in 1 shards" in out and "2 samples in 1 shards written in" in out
    assert "samples/s" in out and "quarantined: 1 duplicate; each is named in" in out
    code, out, err = run("ingest", "photos", "hr", "--dry-run")
    assert "0 of 1 shards" in out and "would set aside: 1 duplicate" in out
    assert "not been looked at" not in out
    for wrong, said in (
        (("--shrink", "nope"), "a number of 1 or more, or auto"),
        (("--shrink", "0.5"), "Give 1 or more or 'auto'"),
        (("--duplicates", "some"), "Give keep, exact, near"),
        (("--against", "nowhere"), "nowhere does not exist"),
    ):
        code, out, err = run("ingest", "photos", "other", *wrong)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "other").exists()
