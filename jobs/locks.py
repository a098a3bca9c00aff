"""One at a time: a lock that a dead process cannot hold, and that names who holds it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from teasr.errors import TeasrError
from teasr.shards import write_bytes

_PATIENCE = 0.3  # seconds, since `holder` takes the lock to look


class Busy(TeasrError):  # noqa: N818
    """Another process is at it (exit 75, `EX_TEMPFAIL`: the same command works later)."""

    exit_code = os.EX_TEMPFAIL


@contextmanager
def only_one(path: Path, doing: str) -> Iterator[None]:
    """Within this block, nobody else on this machine is within one of the same `path`.

    The system frees the lock when its holder dies, however that happens. Beside it, `PATH.json`
    says who held it last and since when.

    Args:
        doing: what is done, for the error: "A retraining of 'teasr'".

    Raises:
        Busy: when another process holds the lock, with its id and since when.
    """
    about = path.with_name(f"{path.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        where = f"{path.parent}{_holder(about)}"
        raise Busy(f"{doing} is running in {where}.", "Wait for it to end.") from None
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = json.dumps({"pid": os.getpid(), "since": since})
        write_bytes(str(about.absolute()), holder.encode())
        yield
    finally:
        lock.release()


def holder(path: Path) -> str | None:
    """Who is within `only_one(path)`, for people; None when nobody is."""
    if not path.exists():
        return None
    try:
        with FileLock(path).acquire(timeout=0):
            return None
    except Timeout:
        return _holder(path.with_name(f"{path.name}.json")).strip(" ()") or "somebody"


def _holder(about: Path) -> str:
    try:
        holder = json.loads(about.read_text())
        return f" (process {holder['pid']}, since {holder['since'].replace('T', ' ')})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # it has only just begun
