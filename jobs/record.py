"""What a run leaves behind beside its checkpoints: the losses of each step, and its best models.

`losses.jsonl` has one line a step, in full precision: `samples` consumed before and after, the
`step` that was reached, `total`, `terms` (means over the batches of all workers) and
`gradient_norm` (null between the micro-batches of one step); of a step that was left out,
`not_finite` names the term. A run that goes on from a checkpoint cuts off what came after it, so
the file is always the history of the run as it stands.

`best/` holds the models whose previews scored best. Ray Train keeps checkpoints by age or by score,
not both: it keeps the last ones, and these are apart.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from teasr.shards import write_bytes

RUN_FILE = "run.json"
PROGRESS_FILE = "progress.json"
LOSSES_FILE = "losses.jsonl"
BEST_FOLDER = "best"
STATE_FILE = "teasr.json"
"""In each checkpoint: where the run stands."""
_LIST_FILE = "best.json"
_TAIL_BYTES = 64 * 1024
RECENT = 50
"""Steps over which a term's mean is taken, to judge its growth."""


def read_losses(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of `losses.jsonl`, up to the first that is not whole; none when it is not there."""
    for line, _ in _lines(path):
        yield line


def last_loss(path: Path) -> dict[str, Any] | None:
    """The last whole line of `losses.jsonl`, read from its end; None where there is none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # after the last newline: nothing, or half a line
    for raw in reversed(lines):
        try:
            line: dict[str, Any] = json.loads(raw)
            return line
        except ValueError:  # the first, where the tail began within it
            continue
    return None


def seconds_left(progress: Mapping[str, Any]) -> float:
    """Of training, by what `progress.json` says is done."""
    done: float = progress["progress"]
    return float(progress["seconds"]) * (1 - done) / max(done, 1e-9)


class LossFile:
    """`losses.jsonl` in `folder`, from `samples` on; nothing is written where there is no such
    folder."""

    def __init__(self, folder: Path, samples: int) -> None:
        self._file = None
        if not folder.is_dir():
            return
        path = folder / LOSSES_FILE
        end = 0
        for line, after in _lines(path):
            if line["samples"][1] > samples:
                break
            end = after
        self._file = path.open("ab")
        self._file.truncate(end)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; it outlives this process."""
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()

    def sync(self) -> None:
        """Have all lines on the disk, which outlives this machine's power."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line and the byte after it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        end = 0
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:  # cut off, when the machine went down
                return
            if not raw.endswith(b"\n"):
                return
            end += len(raw)
            yield line, end


class Growth:
    """Finds the term of a loss that has grown beyond `limit` times its lowest mean.

    Args:
        limit: of the mean over the last `RECENT` steps over the lowest such mean; None finds none.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._recent: dict[str, deque[float]] = {}
        self._lowest: dict[str, tuple[float, int]] = {}

    def add(self, step: int, terms: Mapping[str, float]) -> tuple[str, int] | None:
        """Count a step.

        Returns:
            The term that has grown too much and the step at which its mean was lowest, or None.
        """
        if self._limit is None:
            return None
        for name, value in terms.items():
            recent = self._recent.setdefault(name, deque(maxlen=RECENT))
            recent.append(value)
            if len(recent) < RECENT:
                continue
            mean = sum(recent) / RECENT
            lowest = self._lowest.setdefault(name, (mean, step))
            if mean < lowest[0]:
                self._lowest[name] = mean, step
            elif mean > self._limit * lowest[0]:
                return name, lowest[1]
        return None


class BestModels:
    """The models in `best/` of a run's folder, and `best.json` that lists them, best first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / BEST_FOLDER

    def entries(self) -> list[dict[str, Any]]:
        """`step`, `psnr_y` and `model`, the folder's name, of each."""
        try:
            listed: list[dict[str, Any]] = json.loads((self._folder / _LIST_FILE).read_text())
        except FileNotFoundError:
            return []
        return listed

    def wants(self, psnr_y: float, keep: int) -> bool:
        """Whether a model of that score is among the best `keep`."""
        if keep == 0 or not self._folder.parent.is_dir():
            return False
        entries = self.entries()
        return len(entries) < keep or psnr_y > entries[keep - 1]["psnr_y"]

    @contextmanager
    def place(self, step: int, psnr_y: float, keep: int) -> Iterator[Path]:
        """A folder to write the model to; when the block ends it is listed, and worse ones go."""
        self._folder.mkdir(exist_ok=True)
        name = f"step-{step:06d}"
        partial, final = self._folder / f"{name}.partial", self._folder / name
        for left in (partial, final):  # by a worker that died, or before a resume
            shutil.rmtree(left, ignore_errors=True)
        yield partial
        partial.rename(final)
        others = [entry for entry in self.entries() if entry["step"] != step]
        entries = [*others, {"step": step, "psnr_y": psnr_y, "model": name}]
        entries = sorted(entries, key=lambda entry: -entry["psnr_y"])[:keep]
        text = json.dumps(entries, indent=1) + "\n"
        write_bytes(str((self._folder / _LIST_FILE).absolute()), text.encode())
        kept = {entry["model"] for entry in entries}
        for path in self._folder.glob("step-*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
