"""Where tensors lie in safetensors files: headers read and checked, values left where they are.

A file is 8 bytes of length, that many of JSON, and the data. Reading the headers alone tells
whether weights are whole and of the right shapes and types before gigabytes of them are touched.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from teasr.errors import TeasrError, UsageError

STEM = "diffusion_pytorch_model"
"""Name of weights in a folder of diffusers, without suffix."""
INDEX_SUFFIX = ".safetensors.index.json"

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""The types that are read, by their names in a header."""
_LARGEST_HEADER = 100 << 20  # of the format


@dataclass(frozen=True)
class Place:
    """Where a tensor's values are: `size` bytes of `path` from `start`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path: Path) -> dict[str, Place]:
    """The tensors in a safetensors file by name, after a check against the size of the file.

    Raises:
        UsageError: when it cannot be opened.
        TeasrError: when it is damaged or shorter than its header says.
    """
    try:
        length = path.stat().st_size
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if length < 8 or size > min(_LARGEST_HEADER, length - 8):
                raise _damaged(path, "its header does not fit into it")
            header = json.loads(stream.read(size))
        places = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(side) for side in entry["shape"])
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise TeasrError(
                    f"'{name}' in {path} is of type {entry['dtype']}.",
                    f"Types that are read: {', '.join(DTYPES)}.",
                )
            if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
                raise _damaged(path, f"'{name}' has another size than its shape")
            if 8 + size + end > length:
                raise TeasrError(
                    f"{path} is cut off: '{name}' ends at byte {8 + size + end:,} of {length:,}.",
                    "Copy or download the file again.",
                )
            places[name] = Place(path, dtype, shape, 8 + size + begin, end - begin)
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path, "its header is not a table of tensors") from None
    return places


def find_tensors(source: Path) -> dict[str, Place]:
    """Every tensor of a safetensors file, or of a folder with one, or with shards and their index.

    Raises:
        UsageError: when there are no weights, several candidates, or a shard is missing.
        TeasrError: when a file is damaged or cut off.
    """
    if source.is_file():
        return read_header(source)
    indices = sorted(source.glob(f"*{INDEX_SUFFIX}"))
    files = sorted(source.glob("*.safetensors"))
    if len(indices) > 1 or (not indices and len(files) != 1):
        found = ", ".join(path.name for path in indices or files) or "nothing of the kind"
        raise UsageError(
            f"{source} does not say which weights are meant: {found} is there.",
            f"One *{INDEX_SUFFIX} with its shards, or one *.safetensors, is expected.",
        )
    if not indices:
        return read_header(files[0])
    try:
        weight_map = json.loads(indices[0].read_text())["weight_map"]
        owners = {str(name): source / str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(indices[0], "it is not an index of shards") from None
    headers = {}
    for path in sorted(set(owners.values())):
        if not path.is_file():
            count = sum(owner == path for owner in owners.values())
            raise UsageError(
                f"{path.name} is missing in {source}; {indices[0].name} expects {count} tensors "
                "in it.",
                "Download the missing file.",
            )
        headers[path] = read_header(path)
    for name, path in owners.items():
        if name not in headers[path]:
            raise UsageError(
                f"'{name}' is missing in {path}, where {indices[0].name} expects it.",
                "Download both files again, from one source.",
            )
    return {name: headers[path][name] for name, path in owners.items()}


def _damaged(path: Path, reason: str) -> TeasrError:
    return TeasrError(f"{path} is damaged: {reason}.", "Copy or download the file again.")
