"""The same work on many shards: one task on Ray for each, JSON objects in and out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.shard_job import OnRay, map_on_ray

Work = Callable[[dict[str, Any]], dict[str, Any]]
"""A JSON object in, a JSON object out. It is sent to Ray workers."""


def each_shard(
    inputs: Sequence[dict[str, Any]], work: Work, doing: str
) -> Iterator[dict[str, Any]]:
    """`work(input)` for each of `inputs`, in no fixed order.

    Args:
        inputs: of each shard; its `url` names it when something goes wrong.
        work: what is done with it.
        doing: what the workers did, for the message when they are lost.

    Raises:
        TeasrError: the first that `work` raises, as it is; and when workers are lost.
    """
    # Plain ASCII JSON: a path on Linux may hold bytes that are no UTF-8.
    for result in map_on_ray(_Task(work), [json.dumps(given) for given in inputs], doing):
        yield json.loads(result)


@dataclass(frozen=True)
class _Task(OnRay):
    work: Work

    def __call__(self, given: str) -> str:
        return json.dumps(self.work(json.loads(given)))

    def name(self, given: str) -> str:
        return f"Shard {json.loads(given)['url']}"
