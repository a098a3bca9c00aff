"""What a cluster must have is checked before anything starts, on a Ray of two CPUs."""

from __future__ import annotations

import pytest

from jobs.distill import _check_resources
from jobs.recipe import load_recipe
from pipelines.runtime import nodes_for, room_for
from teasr.errors import UsageError

pytestmark = pytest.mark.usefixtures("ray_session")


def test_room_is_counted_node_by_node() -> None:
    assert [room_for({"CPU": cpus}) for cpus in (0.5, 1, 1.5, 2, 3)] == [4, 2, 1, 1, 0]
    assert room_for({"CPU": 1, "GPU": 1}) == 0
    assert nodes_for("data") == nodes_for("training") == {}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["training.workers=2"], r"training\.workers=2 with 1 CPU.*this Ray has 2, 3 are needed"),
        (["training.cpus_per_worker=2"], r"leave no CPU for the feed"),
        (["training.workers=3", "training.min_workers=2"], r"training\.min_workers=2 with 1 CPU"),
        (["training.gpu=true"], r"need as many GPUs; this Ray has 0"),
        (
            ["feed.crop=1024", "training.batch=32"],
            r"The feed needs \d{3,} MB of object store for 1 workers.*this Ray has \d+ MB",
        ),
    ],
)
def test_too_much_is_refused_with_what_there_is(settings: list[str], told: str) -> None:
    recipe = load_recipe("quickstart", ["data=x", *settings])
    with pytest.raises(UsageError, match=told):
        _check_resources(recipe)


def test_what_fits_may_start() -> None:
    for settings in ([], ["training.workers=8", "training.min_workers=1"]):
        _check_resources(load_recipe("quickstart", ["data=x", *settings]))


def test_fewer_workers_than_at_least() -> None:
    with pytest.raises(UsageError, match="min_workers cannot be more than workers"):
        load_recipe("quickstart", ["training.min_workers=2"])
