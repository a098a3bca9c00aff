"""Headers against the library that writes them, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from teasr.backbones.safetensors_files import (
    DTYPES,
    INDEX_SUFFIX,
    STEM,
    find_tensors,
    read_header,
)
from teasr.errors import TeasrError, UsageError


def tensors() -> dict[str, Tensor]:
    """One of each type, of another shape each, a scalar and an empty one among them."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer.{name}": torch.randint(0, 2, (i, 3)[: i % 3], generator=generator).to(dtype)
        for i, (name, dtype) in enumerate(DTYPES.items())
    } | {"empty": torch.zeros(0, 4)}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with two shards and their index."""
    every = tensors()
    names = list(every)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        path = tmp_path / f"{STEM}-{i:05}-of-00002.safetensors"
        save_file({name: every[name] for name in part}, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, path.name)
    (tmp_path / f"{STEM}{INDEX_SUFFIX}").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_every_tensor_is_found_where_its_bytes_are(shards: Path) -> None:
    places = find_tensors(shards)
    assert places.keys() == tensors().keys()
    for name, tensor in tensors().items():
        place = places[name]
        assert (place.dtype, place.shape) == (tensor.dtype, tuple(tensor.shape))
        stored = place.path.read_bytes()[place.start : place.start + place.size]
        assert stored == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    assert find_tensors(path) == find_tensors(tmp_path) == read_header(path)


def shard(folder: Path) -> Path:
    return folder / f"{STEM}-00002-of-00002.safetensors"


def index(folder: Path) -> Path:
    return folder / f"{STEM}{INDEX_SUFFIX}"


def forget(folder: Path) -> None:
    described = json.loads(index(folder).read_text())
    described["weight_map"]["layer.extra"] = shard(folder).name
    index(folder).write_text(json.dumps(described))


def header(content: Any) -> Callable[[Path], object]:
    """A shard of this header and 8 bytes of data."""
    text = json.dumps(content).encode()
    return lambda folder: shard(folder).write_bytes(
        len(text).to_bytes(8, "little") + text + bytes(8)
    )


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("harm", "kind", "message"),
    [
        (
            lambda f: shard(f).unlink(),
            UsageError,
            r"00002-of-\d+\.safetensors is missing in .* 6 t",
        ),
        (
            lambda f: os.truncate(shard(f), shard(f).stat().st_size - 1),
            TeasrError,
            r"00002-of-.* is cut off: '.*' ends at byte [\d,]+ of [\d,]+",
        ),
        (lambda f: shard(f).write_bytes(b"x"), TeasrError, "is damaged: its header does not fit"),
        (lambda f: os.truncate(shard(f), 50), TeasrError, "is damaged: its header does not fit"),
        (header([]), TeasrError, "not a table of tensors"),
        (header({"a": {}}), TeasrError, "not a table of tensors"),
        (header(entry(shape=[3])), TeasrError, "'a' has another size than its shape"),
        (header(entry(data_offsets=[-8, 0])), TeasrError, "'a' has another size than its shape"),
        (header(entry(data_offsets=[8, 16])), TeasrError, "is cut off: 'a' ends at byte"),
        (header(entry(dtype="F4")), TeasrError, "'a' in .* is of type F4. Types that are read: BF"),
        (lambda f: index(f).write_text("{}"), TeasrError, "not an index of shards"),
        (forget, UsageError, r"'layer\.extra' is missing in .*00002-of-"),
        (lambda f: index(f).unlink(), UsageError, "does not say which weights are meant: .*00001"),
        (shutil.rmtree, UsageError, "nothing of the kind"),
    ],
)
def test_what_is_wrong_is_named(
    shards: Path, harm: Callable[[Path], object], kind: type[TeasrError], message: str
) -> None:
    harm(shards)
    with pytest.raises(kind, match=message):
        find_tensors(shards)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Cannot read .*none\.safetensors: No such file"):
        read_header(tmp_path / "none.safetensors")
