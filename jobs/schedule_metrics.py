"""What Prometheus can know of retrainings and champions, told by `teasr schedule run`.

A retraining ends with its process and a promotion takes seconds: nobody would come by in time to
read what they count. What is told is therefore read, whenever Prometheus asks, from the records
that they leave, in `HOME/schedule.db` and in the registry: nothing is lost with a service or a Ray
that ends, and promotions by hand are among them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs import status
from jobs.schedule_store import OPEN, Store
from teasr.processes import check_port

log = logging.getLogger(__name__)

RETRAININGS = "teasr_retrainings"
ENDED = "teasr_retraining_ended_time_seconds"
NEXT = "teasr_retraining_next_time_seconds"
OPEN_NOW = "teasr_retraining_open"
CHAMPION = "teasr_champion_version"
SINCE = "teasr_champion_since_time_seconds"
CHANGES = "teasr_champion_changes"
UP = "teasr_records_up"

EXPORTED = (f"{RETRAININGS}_total", ENDED, NEXT, OPEN_NOW, CHAMPION, SINCE, f"{CHANGES}_total", UP)
"""As Prometheus knows them."""


def serve_metrics(home: Path, host: str, port: int) -> None:
    """Answer Prometheus at `host` and `port` from a thread, as long as this process lives.

    Raises:
        UsageError, TeasrError: when nobody may listen there.
    """
    check_port(host, port)
    registry = CollectorRegistry()
    registry.register(Records(home))
    start_http_server(port, host, registry)


class Records(Collector):
    """Reads the records of a working folder whenever it is asked."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask the stores."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All figures; of a store that is away, only that it is."""
        up = GaugeMetricFamily(UP, "1 when the records could be read.", labels=["source"])
        for source, read in (("schedule", self._retrainings), ("registry", self._champions)):
            try:
                found = read()
            except Exception as error:  # of any store; Prometheus is told the others
                log.warning("%s: %s", source, error)
                found = []
                up.add_metric([source], 0)
            else:
                up.add_metric([source], 1)
            yield from found
        yield up

    def _retrainings(self) -> list[Metric]:
        store = Store(self._home)
        runs, now = store.runs(), datetime.now(UTC)
        ended = GaugeMetricFamily(
            ENDED, "When the last one ended, by how.", labels=["schedule", "state"]
        )
        last = {(run.schedule, run.state): run.ended for run in runs if run.ended}
        for (schedule, state), at in last.items():
            ended.add_metric([schedule, state], _seconds(at))
        total = CounterMetricFamily(
            RETRAININGS, "Retrainings that ended, by how.", labels=["schedule", "state"]
        )
        for key, number in Counter(
            (run.schedule, run.state) for run in runs if run.state not in OPEN
        ).items():
            total.add_metric(list(key), number)
        coming = GaugeMetricFamily(NEXT, "When the next is due.", labels=["schedule"])
        waiting = GaugeMetricFamily(
            OPEN_NOW, "Retrainings that wait or run.", labels=["schedule", "state"]
        )
        for schedule in store.schedules():
            trigger = schedule.trigger
            due = trigger.get_next_fire_time(None, now) if trigger else None
            if due:
                coming.add_metric([schedule.name], due.timestamp())
            for state in OPEN:
                number = sum(run.schedule == schedule.name and run.state == state for run in runs)
                waiting.add_metric([schedule.name, state], number)
        return [total, ended, coming, waiting]

    def _champions(self) -> list[Metric]:
        version = GaugeMetricFamily(CHAMPION, "The version that is live.", labels=["model"])
        since = GaugeMetricFamily(SINCE, "Since when it is live.", labels=["model"])
        changes = CounterMetricFamily(
            CHANGES, "Promotions, refusals and rollbacks.", labels=["model", "outcome"]
        )
        for model in status.models(self._home) or ():
            if model.champion is not None:
                version.add_metric([model.model], model.champion)
            if model.since is not None:
                since.add_metric([model.model], _seconds(model.since))
            for outcome, number in model.changes.items():
                changes.add_metric([model.model, outcome], number)
        return [version, since, changes]


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()
