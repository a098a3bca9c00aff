"""Datasets that are damaged: one line that names shard and sample, no half result, no traceback."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs import cli
from pipelines.restore import restore_many
from pipelines.synthesize import synthesize
from teasr.backbones import PRESETS, DualBranchDiT, save_model
from teasr.errors import TeasrError
from teasr.images import encode
from teasr.restoration import RestorationSettings
from teasr.shards import Manifest, Sample, ShardInfo, write_manifest, write_shard

pytestmark = pytest.mark.usefixtures("ray_session")


def _members(*names: str) -> Callable[[Path], None]:
    """Puts a shard of these members, each the right bytes for its name, in place of the second."""

    def damage(folder: Path) -> None:
        members = {}
        with tarfile.open(folder / "hr-00001.tar") as tar:
            for member in tar:
                members[member.name.partition(".")[2]] = tar.extractfile(member).read()  # type: ignore[union-attr]
        with tarfile.open(folder / "hr-00001.tar", "w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                data = members.get(name.rpartition(".")[2], b"")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    return damage


def _cut(folder: Path) -> None:
    data = (folder / "hr-00001.tar").read_bytes()
    (folder / "hr-00001.tar").write_bytes(data[: len(data) // 2])


def _other_pictures(folder: Path) -> None:
    (folder / "hr-00001.tar").write_bytes((folder / "hr-00000.tar").read_bytes())


def _lost(folder: Path) -> None:
    (folder / "hr-00001.tar").unlink()


def _one_less(folder: Path) -> None:
    """The manifest itself is whole, but counts a sample that the shard has not."""
    data = json.loads((folder / "manifest.json").read_text())
    shards = [ShardInfo.model_validate(shard) for shard in data["shards"]]
    shards[1] = shards[1].model_copy(update={"samples": 2})
    write_manifest(str(folder), Manifest(kind="hr", shards=tuple(shards)))


DAMAGES = {
    "cut": (_cut, "hr-00001.tar is cut short or damaged after 'b.png'"),
    "no picture": (_members("b.json"), "hr-00001.tar: the sample 'b' is neither"),
    "no json": (_members("b.png"), "hr-00001.tar: the sample 'b' has no .json member"),
    "not adjacent": (_members("b.png", "c.png", "b.json", "c.json"), "the sample 'b' has no .json"),
    "twice": (
        _members("b.png", "b.json", "b.png", "b.json"),
        "hr-00001.tar: 'b.png' is there twice",
    ),
    "outside": (_members("../b.png", "../b.json"), "hr-00001.tar: The key '../b' cannot be used"),
    "other pictures": (_other_pictures, "hr-00001.tar is not the one that the manifest lists"),
    "lost": (_lost, "There is no shard"),
    "miscounted": (_one_less, "hr-00001.tar holds 1 samples; the manifest lists 2"),
}


@pytest.fixture
def hr(tmp_path: Path, photo: Callable[..., np.ndarray]) -> Path:
    """Two shards of one picture."""
    infos = []
    for i, key in enumerate("ab"):
        sample = Sample(key, {"png": encode(photo(64, 64, seed=i)), "json": b"{}"})
        infos.append(write_shard(str(tmp_path / "hr" / f"hr-{i:05d}.tar"), [sample]))
    write_manifest(str(tmp_path / "hr"), Manifest(kind="hr", shards=tuple(infos)))
    return tmp_path / "hr"


@pytest.mark.parametrize("name", DAMAGES)
def test_synthesize_names_the_damage_and_leaves_no_dataset(
    hr: Path, tmp_path: Path, name: str
) -> None:
    damage, told = DAMAGES[name]
    damage(hr)
    with pytest.raises(TeasrError) as caught:
        synthesize(str(hr), str(tmp_path / "pairs"))
    assert told in str(caught.value)
    left = {path.name for path in (tmp_path / "pairs").iterdir()}
    assert not left & {"manifest.json", "pairs-00001.tar", "pairs-00001.tar.stats.json"}
    assert not [name for name in left if name.endswith(".partial")]


def test_restore_tells_the_damaged_shards_and_does_the_others(hr: Path, tmp_path: Path) -> None:
    network = DualBranchDiT(PRESETS["teasr-xs"])
    save_model(network, network.state_dict(), tmp_path / "model")
    _cut(hr)
    settings = RestorationSettings(tile=16)
    result = restore_many(tmp_path / "model", str(hr), tmp_path / "out", settings)
    assert result.done == ("a",)
    assert [(failure.name, failure.reason) for failure in result.failed] == [
        ("hr-00001.tar", "damaged-shard")
    ]
    assert DAMAGES["cut"][1] in result.failed[0].message


@pytest.mark.parametrize("command", ["synthesize", "restore"])
def test_the_command_line_answers_in_one_line(
    hr: Path,
    tmp_path: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _cut(hr)
    model = ["teasr-s"] if command == "restore" else []
    monkeypatch.setattr(sys, "argv", ["teasr", command, *model, str(hr), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    assert DAMAGES["cut"][1] in err
    assert "Traceback" not in out + err
    (hr / "manifest.json").write_text("[")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "is not a manifest" in capsys.readouterr().err
