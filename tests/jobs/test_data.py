"""`teasr data`: what the commands say, their exit codes, and the page as a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.data_page import data_sheet
from pipelines.ingest import ingest
from pipelines.look import choose, documents
from pipelines.synthesize import synthesize
from teasr.gallery import Card, page
from teasr.images import encode
from teasr.plots import Choices
from teasr.shards import Manifest, Sample, read_manifest, write_manifest, write_shard

pytestmark = pytest.mark.usefixtures("ray_session")

Photo = Callable[..., np.ndarray]
Run = Callable[..., tuple[int, str, str]]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@pytest.fixture(scope="module")
def hr(tmp_path_factory: pytest.TempPathFactory, photo: Photo) -> str:
    """Five photographs in three HR shards."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "album").mkdir()
    for i in range(5):
        (folder / "album" / f"p{i}.png").write_bytes(encode(photo(80 + i, 100, seed=i)))
    return ingest([str(folder / "album")], str(folder / "hr"), shard_size=2).destination


@pytest.fixture(scope="module")
def pairs(hr: str) -> str:
    return synthesize(hr, f"{hr}-pairs", copies=4, crop=64).destination


def test_show_says_what_a_dataset_is(run: Run, hr: str, pairs: str) -> None:
    code, out, _ = run("data", "show", pairs)
    assert code == 0
    manifest = read_manifest(pairs)
    for part in (manifest.fingerprint, str(manifest.parent), "20 in 3 shards", "copies 4"):
        assert part in out
    assert re.search(r"width +64 pixels\n", out) and "20 lr.png" in out
    assert "looked at" not in out
    code, out, _ = run("data", "show", hr, "--shards", "2")
    assert code == 0 and re.search(r"height +80 to 83 pixels, median", out)
    assert re.search(r"looked at +3 samples in 2 of 3 shards", out) and "3 png" in out


def test_show_reads_urls(run: Run, pairs: str) -> None:
    code, out, _ = run("data", "show", f"file://{pairs}")
    assert code == 0 and read_manifest(pairs).fingerprint in out


def test_validate_answers_by_its_exit_code(run: Run, pairs: str, tmp_path: Path) -> None:
    code, out, err = run("data", "validate", pairs, "--replay")
    assert (code, err) == (0, "") and "sound: 20 samples in 3 shards" in out
    broken = shutil.copytree(pairs, tmp_path / "broken")
    names = [shard.name for shard in read_manifest(pairs).shards]
    (broken / names[0]).write_bytes((broken / names[0]).read_bytes()[:5000])
    for number in range(7):
        (broken / f"extra{number}.tar").touch()
    code, out, err = run("data", "validate", str(broken), "--show", "3")
    assert code == 1 and len(err.strip().splitlines()) == 1
    assert f"Delete {names[0]} and run the command that made the dataset again" in err
    assert "✗ 7 in files that the manifest does not list" in out and "... and 4 more" in out
    assert out.count("extra") == 3
    (broken / "manifest.json").write_text("{")
    code, out, err = run("data", "validate", str(broken))
    assert code == 1 and "manifest.json" in err


def test_diff_answers_by_its_exit_code(run: Run, hr: str, pairs: str, tmp_path: Path) -> None:
    code, out, _ = run("data", "diff", pairs, pairs + "/")
    assert code == 0 and "the same data" in out
    other = synthesize(hr, str(tmp_path / "other"), copies=3, seed=1, crop=64).destination
    code, out, err = run("data", "diff", pairs, other, "--show", "2")
    assert code == 1 and len(err.strip().splitlines()) == 1
    assert "seed: 0 -> 1" in out and "options.copies: 4 -> 3" in out
    assert "5 samples only in A: p0-v3, p1-v3 and 3 more" in out
    assert "15 samples with different bytes" in out and "... and 13 more" in out
    assert "of 255 grey levels" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "missing"], "not a dataset"),
        (["validate", "missing"], "not a dataset"),
        (["diff", "missing", "missing"], "not a dataset"),
        (["sheet", "missing"], "not a dataset"),
        (["sheet", "PAIRS", "--preset", "nope"], "teasr, "),
        (["sheet", "PAIRS", "--out", "PAIRS"], "--out"),
        (["show", "s9://bucket/x"], "fsspec"),
    ],
)
def test_mistakes_are_told_in_one_line(
    run: Run, pairs: str, tmp_path: Path, arguments: list[str], told: str
) -> None:
    given = [pairs if argument == "PAIRS" else argument for argument in arguments]
    code, _, err = run("data", *given)
    assert code == 2 and told in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_looking_at_damaged_data_points_to_validate(run: Run, pairs: str, tmp_path: Path) -> None:
    broken = shutil.copytree(pairs, tmp_path / "broken")
    for shard in read_manifest(pairs).shards:
        (broken / shard.name).write_bytes((broken / shard.name).read_bytes()[:3000])
    for command in ("show", "sheet"):
        code, _, err = run("data", command, str(broken))
        assert code == 1 and f"teasr data validate {broken}" in err
        assert len(err.strip().splitlines()) == 1


def test_synthesize_replays(run: Run, hr: str, pairs: str) -> None:
    code, out, err = run("synthesize", hr, "again", "--replay", pairs, "--dry-run")
    assert code == 0 and "3 of 3 shards (20 samples)" in out and not Path("again").exists()
    code, out, err = run("synthesize", hr, "again", "--replay", pairs)
    assert code == 0, err
    assert f"the same data as {pairs}" in out
    assert run("data", "diff", pairs, "again")[0] == 0
    code, _, err = run("synthesize", hr, "x", "--replay", pairs, "--seed", "0", "--crop", "64")
    assert code == 2 and "--seed and --crop cannot be given with --replay" in err
    assert not Path("x").exists() and len(err.strip().splitlines()) == 1


def test_a_replay_that_is_not_exact_says_so(
    run: Run, hr: str, pairs: str, tmp_path: Path, photo: Photo
) -> None:
    (tmp_path / "album").mkdir()
    for i in range(4):  # the fifth is lost
        (tmp_path / "album" / f"p{i}.png").write_bytes(encode(photo(80 + i, 100, seed=i)))
    source = ingest([str(tmp_path / "album")], str(tmp_path / "hr")).destination
    code, out, err = run("synthesize", source, "again", "--replay", pairs)
    assert code == 1 and len(err.strip().splitlines()) == 1
    assert "quarantined: 4 source-missing" in out and "4 samples only in A: p4-v0" in out


def test_samples_are_drawn_from_the_whole_dataset(pairs: str) -> None:
    keys = [sample.key for sample in choose(pairs, 6, seed=1)]
    assert len(set(keys)) == 6 and keys == [sample.key for sample in choose(pairs, 6, seed=1)]
    everything = [document.key for document in documents(pairs).documents]
    assert len(everything) == 20 and set(keys) < set(everything)
    assert {s.key for n in range(12) for s in choose(pairs, 6, seed=n)} == set(everything)
    assert [sample.key for sample in choose(pairs, 99)] == everything


def test_a_sheet_of_pairs(run: Run, pairs: str) -> None:
    code, out, _ = run("data", "sheet", pairs, "--out", "look", "--samples", "5")
    assert code == 0 and "look/index.html" in out and "20 samples in 3 shards" in out
    with Image.open("look/sheet.png") as sheet:
        assert sheet.width > 900 and sheet.height > 400
    text = Path("look/index.html").read_text()
    assert text.count("<article>") == 5 and text.count('type="range"') == 5
    assert "JPEG: quality" in text and "kernel shape" in text and "Of all 20 samples" in text
    assert "what the preset &#x27;teasr&#x27; says" in text
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert sources and all(s.startswith(("data:image/", "#")) for s in sources)
    assert "http://" not in text and "https://" not in text


def test_a_preset_that_is_not_known_is_said_and_can_be_given(hr: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: teasr\n")
    made = synthesize(hr, str(tmp_path / "pairs"), preset=str(file), crop=64).destination
    text = data_sheet(made, tmp_path / "a", samples=2).page.read_text()
    assert "&#x27;mine&#x27; is not known here" in text and 'class="line"' not in text
    text = data_sheet(made, tmp_path / "b", samples=2, preset=str(file)).page.read_text()
    assert "what the preset &#x27;mine&#x27; says" in text and 'class="line"' in text


def test_a_sheet_of_pictures_with_what_their_json_says(
    run: Run, tmp_path: Path, photo: Photo
) -> None:
    about = b'{"width": 100, "height": 80, "format": "jpeg", "jpeg_quality": 83, "sharpness": 2.5}'
    samples = [
        Sample("a", {"jpg": encode(photo(80, 100), "jpeg"), "json": about}),
        Sample("b", {"png": encode(photo(64, 64)), "json": b"{}"}),
    ]
    info = write_shard(str(tmp_path / "hr" / "hr-0.tar"), samples)
    write_manifest(str(tmp_path / "hr"), Manifest(kind="hr", shards=(info,)))
    code, _, err = run("data", "sheet", "hr", "--out", "look")
    assert code == 0, err
    text = Path("look/index.html").read_text()
    for part in ("JPEG quality of the file: 83", "100 × 80", "64 × 64", "format in the shard"):
        assert part in text
    assert 'type="range"' not in text


def browse(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    return subprocess.run(
        [CHROMIUM, *flags, *options, f"file://{file}"],
        capture_output=True,
        text=True,
        timeout=120,
    )


@in_a_browser
def test_the_page_compares_in_a_browser(tmp_path: Path) -> None:
    """LR is all red and HR all green: the slider parts them where it stands."""
    red, green = np.zeros((16, 16, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    red[..., 0], green[..., 1] = 255, 255
    hostile = "<img src=x onerror=\"document.title='owned'\">"
    card = Card(hostile, encode(green), (64, 64), encode(red), hostile, {hostile: [hostile]})
    plots = {hostile: [Choices(hostile, {hostile: 3})]}
    text = page("look", {hostile: hostile}, [card], plots, hostile)
    # Moves the pointer to three quarters of the picture, then says what came of it.
    probe = """<script>
      const view = document.querySelector('.compare'), box = view.getBoundingClientRect();
      view.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * 3 / 4}));
      Promise.all([...document.images].map(i => i.decode())).then(() => {
        document.body.dataset.seen = [document.title, document.images.length,
          view.style.getPropertyValue('--at'), document.querySelectorAll('svg.plot').length];
      });
    </script></body>"""
    (tmp_path / "page.html").write_text(text.replace("</body>", probe))
    shown = browse(tmp_path / "page.html", "--virtual-time-budget=5000", "--dump-dom").stdout
    assert 'data-seen="look,2,75%,1"' in shown

    shot = tmp_path / "shot.png"
    browse(tmp_path / "page.html", f"--screenshot={shot}", "--window-size=1280,900")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    reds = ((pixels[..., 0] > 240) & (pixels[..., 1:].max(axis=2) < 15)).sum()
    greens = ((pixels[..., 1] > 240) & (pixels[..., [0, 2]].max(axis=2) < 15)).sum()
    assert greens > 5000
    assert 2.7 < reds / greens < 3.3


@in_a_browser
def test_a_real_page_draws_every_picture_and_plot(pairs: str, tmp_path: Path) -> None:
    made = data_sheet(pairs, tmp_path / "look", samples=3)
    probe = """<script>Promise.all([...document.images].map(i => i.decode())).then(() => {
      const bars = [...document.querySelectorAll('svg .bar')].filter(b => b.getBBox().height > 0);
      document.body.dataset.seen = [document.images.length, bars.length];
    });</script></body>"""
    text = made.page.read_text()
    made.page.write_text(text.replace("</body>", probe))
    shown = browse(made.page, "--virtual-time-budget=5000", "--dump-dom").stdout
    seen = re.search(r'data-seen="(\d+),(\d+)"', shown)
    assert seen is not None and int(seen[1]) == 6 and int(seen[2]) > 100
