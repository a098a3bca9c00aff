"""What a checkpoint of `teasr.engine` is made of, and how one number of workers reads what another
has written.

| file            | holds                                                                         |
|-----------------|-------------------------------------------------------------------------------|
| engine.json     | how it was written: workers, ZeRO stage (`Layout`); for people too            |
| engine/         | DeepSpeed's: trained weights and optimizer; under ZeRO in a part per worker    |
| average-RANK.pt | average of the trained weights by name; under ZeRO-3 a slice per worker       |

Frozen parameters are in none of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from pydantic import Field
from torch import Tensor

from teasr.config import Settings
from teasr.errors import TeasrError

ENGINE_FOLDER = "engine"
LAYOUT_FILE = "engine.json"


class Layout(Settings):
    """Content of `engine.json`."""

    workers: int = Field(ge=1)
    """World size of the run that wrote the checkpoint."""
    zero_stage: int = Field(ge=0, le=3)
    """Its ZeRO stage."""
    average: bool
    """Whether there is an average of the weights."""

    def write(self, folder: Path) -> None:
        """To `folder`/engine.json."""
        (folder / LAYOUT_FILE).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Layout:
        """Of the checkpoint in `folder`.

        Raises:
            TeasrError: when it holds none, or not all of it.
        """
        path = folder / LAYOUT_FILE
        if not path.is_file() or not (folder / ENGINE_FOLDER).is_dir():
            raise TeasrError(
                f"{folder} holds no checkpoint of a training engine.",
                f"A file {LAYOUT_FILE} and a folder {ENGINE_FOLDER} are expected there.",
            )
        layout = cls.from_mapping(json.loads(path.read_text()), str(path))
        missing = [name for name in layout.average_files() if not (folder / name).is_file()]
        if missing:
            raise TeasrError(
                f"{folder} holds no checkpoint that is whole: {missing[0]} is missing.",
                "The folder of each worker must be on storage that all workers see.",
            )
        return layout

    def average_files(self) -> list[str]:
        """Names of the files that the average is in."""
        if not self.average:
            return []
        return [f"average-{rank}.pt" for rank in range(self.workers if self.zero_stage == 3 else 1)]


def save_average(folder: Path, average: Mapping[str, Tensor], rank: int) -> None:
    """Write this rank's part of the average."""
    torch.save(dict(average), folder / f"average-{rank}.pt")


def load_average(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """The average of the weights by name: of the parameter's shape, or under ZeRO-3 flat, its
    slices one after the other with the padding of the last."""
    parts = [
        torch.load(folder / name, map_location="cpu", weights_only=True)
        for name in layout.average_files()
    ]
    if layout.zero_stage < 3:
        result: dict[str, Tensor] = parts[0]
        return result
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def partition(flat: Tensor, elements: int, rank: int, workers: int) -> Tensor:
    """ZeRO-3's slice of a parameter of `elements` elements: equal ones, the last padded with 0.

    Args:
        flat: at least `elements` long; what is beyond is another partition's padding.
    """
    size = -(-elements // workers)
    own = flat[:elements][rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(own, (0, size - len(own)))


@contextlib.contextmanager
def universal(folder: Path) -> Iterator[Path]:
    """DeepSpeed's universal form of the checkpoint in `folder`, which any number of workers loads.

    Collective. One process per machine converts, into a temporary folder that goes at the end.
    """
    name: list[str] = [f"teasr-universal-{os.getpid()}-{os.urandom(4).hex()}"]
    torch.distributed.broadcast_object_list(name)
    # Machines may share their temporary folder too, as containers do.
    converted = Path(tempfile.gettempdir()) / f"{name[0]}-{os.environ.get('NODE_RANK', '0')}"
    converts = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        problem = [_convert(folder / ENGINE_FOLDER, converted / ENGINE_FOLDER) if converts else ""]
        problems: list[str] = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, problem[0])
        if any(problems):
            raise TeasrError(
                f"{folder} was written by another number of workers and cannot be converted: "
                f"{next(filter(None, problems))}",
                "Go on with as many workers as wrote it (engine.json tells).",
            )
        yield converted
        torch.distributed.barrier()  # all have read it
    finally:
        if converts:
            shutil.rmtree(converted, ignore_errors=True)


def _convert(source: Path, target: Path) -> str:
    """Convert `source`; what went wrong, or nothing."""
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True)
    arguments = SimpleNamespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(arguments)
    except Exception as error:  # told by every rank, instead of leaving the others to wait
        return f"{type(error).__name__}: {error}"
    return ""
