"""The gate's report: made of real models and pairs, and as a person sees it."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from numpy.typing import NDArray
from PIL import Image

from jobs import gate_report
from teasr import lineage, promotion, registry, tracking
from teasr.backbones import PRESETS, DualBranchDiT, load_model, save_model
from teasr.errors import UsageError
from teasr.evaluation import Evaluation
from teasr.gate import GateSettings
from teasr.images import bicubic_upsample, encode
from teasr.metrics import score
from teasr.restoration import RestorationSettings, restore
from teasr.shards import Manifest, Sample, read_manifest, write_manifest, write_shard
from tests.browser import Browser, chromium

Photo = Callable[..., NDArray[np.uint8]]
Run = Callable[..., tuple[int, str, str]]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PICTURES = 6
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


class Registered:
    """A benchmark in `pairs`, and two versions of the model `teasr` measured on it."""

    def __init__(self, client: MlflowClient, pairs: Path, fingerprint: str) -> None:
        self.client, self.pairs, self.fingerprint = client, pairs, fingerprint
        self.restored: dict[int, dict[str, NDArray[np.uint8]]] = {}


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, photo: Photo) -> Iterator[Registered]:
    root = tmp_path_factory.mktemp("report")
    pictures = {f"p{i}": photo(64, 80, seed=i) for i in range(PICTURES)}
    low = {key: hr[::4, ::4].copy() for key, hr in pictures.items()}
    samples = [
        Sample(key, {"hr.png": encode(hr), "lr.png": encode(low[key]), "json": b"{}"})
        for key, hr in pictures.items()
    ]
    pairs = root / "pairs"
    pairs.mkdir()
    manifest = Manifest(kind="pairs", shards=(write_shard(str(pairs / "pairs-0.tar"), samples),))
    write_manifest(str(pairs), manifest)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("TEASR_HOME", str(root / "home"))
        client = tracking.connect()
        made = Registered(client, pairs, manifest.fingerprint)
        for version, noise in ((1, 0.0), (2, 0.02)):
            folder = root / f"weights-{version}"
            torch.manual_seed(version)
            network = DualBranchDiT(PRESETS["teasr-xs"])
            state = network.state_dict()
            last = max(name for name in state if name.endswith(".weight") and not state[name].any())
            state[last] = noise * torch.randn_like(state[last])
            save_model(network, state, folder)
            model = load_model(folder)
            made.restored[version] = {
                key: restore(model.network, lr, RestorationSettings(), codec=model.codec)
                for key, lr in low.items()
            }
            scores = {
                "bicubic": {k: score(bicubic_upsample(lr), pictures[k]) for k, lr in low.items()},
                "1 step": {k: score(made.restored[version][k], pictures[k]) for k in low},
            }
            found = Evaluation(
                manifest.fingerprint, scores, {"1 step": 1.5}, {"1 step": 600.0}, "this machine"
            )
            run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
            for name, value in {"versions": "torch 2", "commit": "c0ffee", "data": "hr"}.items():
                client.set_tag(run, f"teasr.{name}", value)
            uri = registry.log_model(client, run, folder)
            tags = {
                "dataset": "data-7", "recipe": "quickstart", "init": "teasr-s",
                "degradation": "teasr 55%, realesrgan 45%", "data_size": "9 photographs in 1 shard",
                "benchmark_location": str(pairs), "champion": "none, as the first",
            }  # fmt: skip
            assert registry.register(client, run, uri, "teasr", found, tags) == version
            if version == 1:
                gate_report.promote(client, "teasr", gate=LENIENT)
        yield made


LENIENT = GateSettings.from_mapping(
    {
        "rules": {
            "better than bicubic": None,
            "fidelity": {"by": 50},
            "hard ones": {
                "metric": "psnr_y", "pictures": ["p3"], "not_worse_than": "champion", "by": 50
            },
            "memory": {"metric": "peak_memory_mb", "at_most": 2000},
        }
    },
    "gate.yaml",
)  # fmt: skip
CONTEST = promotion.Contest(2, 1)


def drawn(registered: Registered, **options: str) -> gate_report.Report:
    return gate_report.draw(registered.client, "teasr", CONTEST, LENIENT, **options)


def pictures_in(html: str, key: str) -> dict[str, NDArray[np.uint8]]:
    """What the page shows of a scene, by name."""
    (article,) = (a for a in html.split("<article")[1:] if f"<h3>{key}</h3>" in a)
    images = re.findall(r'data-system="([^"]+)" src="data:image/png;base64,([^"]+)"', article)
    return {
        name: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for name, data in images
    }


def test_the_page_shows_what_the_models_make(registered: Registered) -> None:
    report = drawn(registered)
    assert report.no_pictures == "" and "http" not in report.html.replace("http-equiv", "")
    assert "Passed: version 2 may take the place of version 1." in report.html
    keys = re.findall(r"<h3>(p\d)</h3>", report.html)
    assert keys[0] == "p3" and len(keys) in (4, 5)  # named, two worst, two best
    differences = {
        key: new.psnr_y - old.psnr_y
        for (key, new), old in zip(
            evaluation(registered, 2).scores["1 step"].items(),
            evaluation(registered, 1).scores["1 step"].values(),
        )
    }
    ranked = sorted(differences, key=differences.__getitem__)
    assert set(keys) == {"p3", *ranked[:2], *ranked[-2:]}
    shown = pictures_in(report.html, "p3")
    assert list(shown) == ["low resolution", "champion (version 1)", "version 2", "original"]
    for version, name in ((1, "champion (version 1)"), (2, "version 2")):
        made = registered.restored[version]["p3"]
        assert np.abs(shown[name].astype(int) - made).max() <= 1
    assert not np.array_equal(shown["version 2"], shown["champion (version 1)"])


def evaluation(registered: Registered, version: int) -> Evaluation:
    found = registry.version_of(registered.client, "teasr", version)
    return registry.required_evaluation(registered.client, found)


def test_a_benchmark_that_cannot_be_read_is_told(registered: Registered, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(registered.pairs, other)
    changed = read_manifest(str(other)).model_copy(update={"seed": 9})
    write_manifest(str(other), changed)
    for where, told in ((tmp_path / "gone", "gone"), (other, "was measured on")):
        report = drawn(registered, benchmark=str(where))
        assert told in report.no_pictures and "<article" not in report.html
        assert "None are shown" in report.html and "Passed" in report.html


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with chromium(CHROMIUM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_a_person_reads_the_verdict_first(
    registered: Registered, browser: Browser, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    page.write_text(drawn(registered).html)
    for width in (1280, 420):
        browser.open(page, width=width)
        assert browser.run("document.documentElement.scrollWidth") <= width
        verdict = browser.run(
            "(b => [b.top, b.bottom])(document.querySelector('.verdict').getBoundingClientRect())"
        )
        assert 0 < verdict[0] < verdict[1] < 400  # without scrolling
    rows = browser.run("[...document.querySelectorAll('.rulings tr')].map(r => r.innerText)")
    assert len(rows) == 1 + 1 + len(LENIENT.rules)
    assert "✓ passed" in rows[1] and "does not count" in "".join(rows)
    dots = browser.run("document.querySelectorAll('svg .spread circle').length")
    assert dots == PICTURES  # LPIPS was not measured
    # The slider compares the two: at the far left only the right picture is seen.
    browser.click(".choice [data-side=left][value='low resolution']")
    left, top, width, _ = browser.box(".stack")
    browser.drag((left + width / 2, top + 5), (left + 1, top + 5))
    at = browser.run("document.querySelector('.stack').style.getPropertyValue('--at')")
    assert float(at.rstrip("%")) < 2
    assert browser.run("document.querySelector('.stack .tag.left').textContent") == "low resolution"


def test_promote_leaves_report_and_pages(registered: Registered, run: Run, tmp_path: Path) -> None:
    """The command line: a dry run that writes the page alone, then the promotion, then back."""
    home = str(registered.pairs.parent / "home")
    gate = tmp_path / "gate.yaml"
    gate.write_text("rules:\n  better than bicubic: null\n  fidelity: {by: 50}\n")
    client = registered.client
    version = client.get_model_version("teasr", "2")
    before = len(promotion.history(client, "teasr"))
    asked = ("promote", "teasr", "--version", "2", "--gate", str(gate), "--home", home)
    code, out, err = run(*asked, "--dry-run", "--report", "page.html")
    assert code == 0, err
    assert "✓ fidelity" in out and "- perception: LPIPS" in out and "nothing was changed" in out
    assert "Passed: version 2" in (tmp_path / "page.html").read_text()
    assert len(promotion.history(client, "teasr")) == before
    assert not [f for f in client.list_artifacts(version.run_id) if f.path == "gate"]

    code, out, err = run(*asked)
    assert code == 0, err
    record = promotion.history(client, "teasr")[0]
    assert record.report == f"runs:/{version.run_id}/gate/version-2-against-1.html"
    path = client.download_artifacts(version.run_id, "gate/version-2-against-1.html")
    assert "Passed: version 2 may take the place of version 1." in Path(path).read_text()
    described = client.get_model_version("teasr", "2")
    assert described.tags["teasr.gate"] == "passed" and described.tags["teasr.replaced"] == "1"
    assert record.report in described.description
    assert "replaced by version 2" in client.get_model_version("teasr", "1").description

    code, out, err = run("history", "teasr", "--version", "2", "--home", home)
    assert code == 0, err
    for told in (
        *("data-7", "9 photographs in 1 shard", "teasr 55%, realesrgan 45%", str(PICTURES)),
        *("quickstart, resolved in runs:/", "recipe.yaml", "teasr-s", "c0ffee", "torch 2"),
        *("passed", "version-2-against-1.html", "became champion, replacing version 1"),
        *("PSNR-Y (dB)", "1 step", "promote by "),
    ):
        assert told in re.sub(r"\s+", " ", out) or told in re.sub(r"\s+", "", out), told

    assert run("rollback", "teasr", "--home", home)[0] == 0
    back = lineage.sections(lineage.version_details(client, "teasr", 2))["Changes"]
    assert "replaced by version 1 (rollback by" in list(back.values())[-1]
    assert "replaced by version 1 (rollback" in client.get_model_version("teasr", "2").description
    again = client.get_model_version("teasr", "1")
    assert again.tags["teasr.live_by"].startswith("rollback by")


def test_two_gates_are_one_too_many(run: Run) -> None:
    code, _, err = run("promote", "teasr", "--gate", "a.yaml", "--recipe", "quickstart")
    assert code == 2 and "Give one of them" in err
    code, _, err = run("promote", "teasr", "--gate", "a.yaml")
    assert code == 2 and "Cannot read a.yaml" in err


def test_names_are_escaped(registered: Registered) -> None:
    rule = {"metric": "psnr_y", "at_least": 1, "pictures": [HOSTILE]}
    gate = GateSettings.from_mapping({"rules": {"hard": rule}}, "gate.yaml")
    html = gate_report.draw(registered.client, "teasr", CONTEST, gate).html
    assert "<img src=x" not in html and "has no picture &lt;img src=x" in html


def test_changed_weights_do_not_go_live(registered: Registered, run: Run) -> None:
    client, home = registered.client, str(registered.pairs.parent / "home")
    champion = promotion.champion_version(client, "teasr")
    other = 3 - (champion or 1)
    stored = registry.resolve(f"models:/teasr/{other}", client) / "model.safetensors"
    kept = stored.read_bytes()
    stored.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    code, _, err = run("promote", "teasr", "--version", str(other), "--home", home)
    stored.write_bytes(kept)
    assert code == 1 and f"weights of teasr version {other} are not those" in err
    assert promotion.champion_version(client, "teasr") == champion


def test_the_first_version_is_held_against_bicubic(registered: Registered) -> None:
    first = promotion.Contest(1, None)
    html = gate_report.draw(registered.client, "teasr", first, GateSettings()).html
    assert "Refused: there is no champion yet." in html  # an untrained network is bicubic
    assert "do not apply to the first one" in html and "against bicubic" in html
    assert list(pictures_in(html, re.findall(r"<h3>(p\d)</h3>", html)[0])) == [
        "low resolution", "version 1", "original"
    ]  # fmt: skip


def test_an_unknown_version_is_told(registered: Registered) -> None:
    with pytest.raises(UsageError, match="no version 9"):
        gate_report.draw(registered.client, "teasr", promotion.Contest(9, 1), LENIENT)
