"""The feed of a run, made anew from its last checkpoint whenever Ray Train (re)starts its workers.

Ray Train makes it in an actor that does nothing else. That is why this is a module of its own, and
imports neither torch nor the loop: they would cost that actor seconds and hundreds of megabytes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import ray.train
from ray.data import DataIterator, Dataset
from ray.train import DataConfig

from jobs.record import STATE_FILE
from pipelines.feed import BATCHES_AHEAD, FeedPosition, FeedSettings, feed, split

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class RunFeed:
    """The feed of the run in `folder`, where its checkpoint stands.

    Ray Train calls it before it knows how many workers there are: the feed is made after that, by
    `InOrder`.
    """

    data: str
    settings: FeedSettings
    batch: int
    folder: Path

    def __call__(self) -> Self:
        return self

    def of(self, workers: int) -> Dataset:
        """The feed of so many workers."""
        state = last_state(self.folder)
        position = FeedPosition.from_mapping(state["feed"], STATE_FILE) if state else None
        return feed(
            self.data, self.settings, batch=self.batch, consumers=workers, position=position
        )


class InOrder(DataConfig):
    """Has Ray Train split the feed in order: its own configuration drops that of the dataset."""

    def configure(
        self, datasets: dict[str, RunFeed], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        (feed,) = datasets.values()
        return [{"train": share} for share in split(feed.of(world_size), world_size)]


def batches_of_worker(batch: int) -> Iterator[dict[str, Tensor]]:
    """The share of the feed of the training worker that this is: batches of so many pairs, the
    columns of `pipelines.feed.feed` as tensors. The feed starts when the first is asked for."""
    yield from ray.train.get_dataset_shard("train").iter_torch_batches(
        batch_size=batch, prefetch_batches=BATCHES_AHEAD, drop_last=True
    )


class Ahead(Generic[Item]):
    """Items of which the first is asked for at once, in a thread; its error comes with it."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._first: Future[Item] = Future()
        # A daemon: a process that fails meanwhile must not wait for it.
        threading.Thread(target=self._start, name="first item", daemon=True).start()

    def _start(self) -> None:
        try:
            self._first.set_result(next(self._items))
        except BaseException as error:
            self._first.set_exception(error)

    def __iter__(self) -> Iterator[Item]:
        yield self._first.result()
        yield from self._items


def last_state(folder: Path) -> dict[str, Any] | None:
    """State in the checkpoint that Ray Train goes on from; None when it has none.

    That is the last one in its list, not the newest folder: a run that was killed may have left a
    folder, whole or not, that it had not listed yet.
    """
    try:
        listed = json.loads((folder / "train" / "checkpoint_manager_snapshot.json").read_text())
        name = listed["latest_checkpoint_result"]["checkpoint_dir_name"]
    except (FileNotFoundError, TypeError):  # no run, or none of its checkpoints was listed
        return None
    state: dict[str, Any] = json.loads((folder / "train" / name / STATE_FILE).read_text())
    return state
