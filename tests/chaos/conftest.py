"""A cluster to be broken, and the table of what became of that."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.nodes import SHARE_EXPIRES, Nodes, missing
from tests.chaos.outcomes import Outcome, table

_outcomes: list[Outcome] = []


@pytest.fixture(scope="session")
def tell() -> Callable[[Outcome], None]:
    """`tell(outcome)` adds a row to the table."""
    return _outcomes.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _outcomes:
        terminalreporter.section("faults")
        terminalreporter.write_line(table(_outcomes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all nodes see, and where their logs go."""
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[Nodes]:
    """A cluster without nodes."""
    if reason := missing():
        pytest.skip(reason)
    kept = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    environment = kept | {
        "TEASR_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        **SHARE_EXPIRES,
    }
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "platform"), str(root)])
    with Nodes(folder, environment) as cluster:
        yield cluster
