"""Comparison: equal data is equal whatever its shards are called; what differs is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.compare import compare
from teasr.errors import TeasrError, UsageError
from teasr.images import encode
from teasr.shards import Manifest, Sample, write_manifest, write_shard

pytestmark = pytest.mark.usefixtures("ray_session")

Photo = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def samples(photo: Photo) -> list[Sample]:
    return [Sample(f"p{i}", {"png": encode(photo(seed=i)), "json": b"{}"}) for i in range(6)]


def dataset(folder: Path, shards: dict[str, list[Sample]], **fields: object) -> str:
    infos = tuple(write_shard(str(folder / name), content) for name, content in shards.items())
    manifest = Manifest.from_mapping({"kind": "hr", "shards": (), **fields}, "test")
    write_manifest(str(folder), manifest.model_copy(update={"shards": infos}))
    return str(folder)


def test_equal_data(samples: list[Sample], tmp_path: Path) -> None:
    a = dataset(tmp_path / "a", {"hr-0.tar": samples[:3]}, versions={"numpy": "1"})
    b = dataset(tmp_path / "b", {"hr-0.tar": samples[:3]}, versions={"numpy": "2"})
    (tmp_path / "b" / "hr-0.tar").unlink()  # equal names: no shard is looked at
    found = compare(a, b)
    assert found.equal and found.same == ("hr-0.tar",)
    assert found.fields == {"versions.numpy": ("1", "2")}


def test_what_differs_is_named(samples: list[Sample], tmp_path: Path, photo: Photo) -> None:
    brighter = Sample("p2", {"png": encode(photo(seed=2) // 2 * 2), "json": b"{}"})
    noted = Sample("p3", {**samples[3].members, "json": b'{"a": 1}'})
    larger = Sample("p4", {"png": encode(photo(100, 100)), "json": b"{}"})
    a = dataset(
        tmp_path / "a",
        {"hr-0.tar": samples[:2], "hr-1.tar": samples[2:5], "hr-2.tar": samples[5:]},
        options={"min_side": 64},
    )
    b = dataset(
        tmp_path / "b",
        {"hr-7.tar": samples[:2], "hr-1.tar": [brighter, noted, larger], "hr-3.tar": []},
        options={"min_side": 32},
        seed=3,
        quarantined={"truncated": 2},
    )
    (tmp_path / "a" / "hr-0.tar").unlink()  # the same shard under another name: not read
    steps: list[tuple[int, int]] = []
    found = compare(a, b, progress=lambda *step: steps.append(step))
    assert not found.equal
    assert found.fields == {
        "quarantined.truncated": (None, 2),
        "options.min_side": (64, 32),
        "seed": (None, 3),
    }
    assert (found.same, found.changed) == (("hr-0.tar",), ("hr-1.tar",))
    assert (found.only_a, found.only_b) == (("hr-2.tar",), ("hr-3.tar",))
    assert (found.keys_only_a, found.keys_only_b) == (("p5",), ())
    assert {s.key: s.members for s in found.samples} == {
        "p2": {"png": 1},
        "p3": {"json": None},
        "p4": {"png": None},
    }
    assert steps[-1] == (4, 4)


def test_other_shard_sizes_are_not_other_samples(samples: list[Sample], tmp_path: Path) -> None:
    a = dataset(tmp_path / "a", {"hr-0.tar": samples[:4], "hr-1.tar": samples[4:]})
    b = dataset(tmp_path / "b", {"hr-0.tar": samples[:2], "hr-1.tar": samples[2:]})
    found = compare(a, b)
    assert not found.equal and found.changed == ("hr-0.tar", "hr-1.tar")
    assert not found.samples and not found.keys_only_a and not found.keys_only_b


def test_what_cannot_be_compared(samples: list[Sample], tmp_path: Path) -> None:
    a = dataset(tmp_path / "a", {"hr-0.tar": samples[:2]})
    b = dataset(tmp_path / "b", {"hr-0.tar": samples[:1]})
    with pytest.raises(UsageError, match="not a dataset"):
        compare(a, str(tmp_path))
    (tmp_path / "b" / "hr-0.tar").write_bytes(b"no tar")
    with pytest.raises(TeasrError, match=r"damaged.*teasr data validate"):
        compare(a, b)
