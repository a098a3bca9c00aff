"""Promotion and its record: on a real MLflow store, cut off anywhere, and by several at once."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from teasr import promotion, registry, tracking
from teasr.errors import TeasrError, UsageError
from teasr.gate import GateSettings, Verdict
from tests.ports import free_port
from tests.registry.figures import evaluation
from tests.test_tracking import mlflow_server


@pytest.fixture
def add(client: MlflowClient, name: str) -> Callable[..., int]:
    """`add(gain)`: the next version of `name`, of an evaluation alone."""
    return lambda gain: add_version(client, name, gain)


def add_version(client: MlflowClient, name: str, gain: float) -> int:
    run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
    registry.store_evaluation(client, run, evaluation(gain))
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    made = client.create_model_version(name, f"runs:/{run}/model", run_id=run)
    client.set_registered_model_alias(name, "challenger", made.version)
    return int(made.version)


def live(client: MlflowClient, name: str) -> tuple[int | None, int | None]:
    """Champion and previous champion."""
    aliases = client.get_registered_model(name).aliases
    champion, previous = aliases.get("champion"), aliases.get("previous")
    return champion and int(champion), previous and int(previous)


def test_promote_rollback_history(client: MlflowClient, add: Callable[..., int], name: str) -> None:
    add(1.0)
    first = promotion.promote(client, name, by="ann")
    assert (first.promoted, first.version, first.replaced) == (True, 1, None)
    add(1.5)
    second = promotion.promote(client, name, by="ann")
    assert (second.promoted, second.version, second.replaced) == (True, 2, 1)
    assert live(client, name) == (2, 1)

    back = promotion.rollback(client, name, by="bob")
    assert (back.promoted, back.version, back.replaced, back.verdict) == (True, 1, 2, None)
    assert live(client, name) == (1, 2)
    promotion.rollback(client, name, by="bob")  # a second one undoes the first
    assert live(client, name) == (2, 1)

    records = promotion.history(client, name)
    assert [(r.action, r.version, r.replaced, r.by, r.state) for r in records] == [
        ("rollback", 2, 1, "bob", "done"),
        ("rollback", 1, 2, "bob", "done"),
        ("promote", 2, 1, "ann", "done"),
        ("promote", 1, None, "ann", "done"),
    ]
    assert records[2].run_id == second.record
    path = client.download_artifacts(second.record, "verdict.json")
    assert Verdict.from_json(Path(path).read_text()) == second.verdict


def test_refused_changes_nothing_and_is_recorded(
    client: MlflowClient, add: Callable[..., int], name: str
) -> None:
    add(1.0)
    promotion.promote(client, name)
    add(0.5)
    refused = promotion.promote(client, name)
    assert not refused.promoted and refused.verdict is not None and not refused.verdict.passed
    assert live(client, name) == (1, None)
    newest = promotion.history(client, name)[0]
    assert (newest.version, newest.verdict, newest.state) == (2, "refused", "refused")
    # The rules are the caller's.
    rules = GateSettings(rules={"fidelity": {"by": 1}})
    assert promotion.promote(client, name, gate=rules).promoted


def test_dry_run_writes_nothing(client: MlflowClient, add: Callable[..., int], name: str) -> None:
    add(1.0)
    outcome = promotion.promote(client, name, dry_run=True)
    assert outcome.verdict is not None and outcome.verdict.passed and not outcome.promoted
    assert live(client, name) == (None, None)
    assert promotion.history(client, name) == []


def test_requests_that_make_no_sense(
    client: MlflowClient, add: Callable[..., int], name: str
) -> None:
    client.create_registered_model(name)
    with pytest.raises(UsageError, match=r"no challenger\. Versions: none"):
        promotion.promote(client, name)
    add(1.0)
    with pytest.raises(UsageError, match="no previous champion"):
        promotion.rollback(client, name)
    promotion.promote(client, name)
    with pytest.raises(UsageError, match=r"no challenger\. Versions: 1 \(champion\)"):
        promotion.promote(client, name)
    with pytest.raises(UsageError, match=r"Version 1 of .* is the champion"):
        promotion.promote(client, name, version=1)
    with pytest.raises(UsageError, match="no version 5"):
        promotion.promote(client, name, version=5)
    with pytest.raises(UsageError, match="no version 5"):
        promotion.rollback(client, name, to=5)


class Killed(BaseException):
    """Stands for the process being killed."""


class DyingClient(MlflowClient):
    """A client whose process dies just before its write number `at`; a dead one writes nothing."""

    def __init__(self, like: MlflowClient, at: int) -> None:
        super().__init__(like.tracking_uri, like._registry_uri)
        self._left = at

    def __getattribute__(self, name: str) -> Any:
        if name in (
            *("create_model_version", "delete_model_version", "set_model_version_tag"),
            *("create_run", "log_text", "set_terminated"),
            *("set_registered_model_alias", "delete_registered_model_alias"),
        ):
            if self._left <= 0:
                raise Killed
            self._left -= 1
        return super().__getattribute__(name)


@pytest.fixture
def known_to_be_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who left a turn behind counts as dead: here the process itself lives on."""
    monkeypatch.setattr(promotion, "_is_alive", lambda process: False)


def turns(client: MlflowClient, name: str) -> int:
    return len(client.search_model_versions(f"name = '{name}.turns'"))


# turn, sign of life, run, verdict.json, verdict.md, | champion, previous, challenger, end, turn
@pytest.mark.parametrize("died_at", range(10))
@pytest.mark.usefixtures("known_to_be_dead")
def test_an_interrupted_promotion_is_done_or_not_done(
    client: MlflowClient, add: Callable[..., int], name: str, died_at: int
) -> None:
    done = died_at >= 6
    for gain in (1.0, 1.5, 2.0):
        add(gain)
        if gain < 2:
            promotion.promote(client, name)
    with pytest.raises(Killed):
        promotion.promote(DyingClient(client, died_at), name)
    assert live(client, name)[0] == (3 if done else 2)

    # Whatever comes next finds a consistent state: the version to go back to is the one before.
    assert promotion.rollback(client, name, dry_run=True).version == (2 if done else 1)
    if done:
        with pytest.raises(UsageError, match="has no challenger"):
            promotion.promote(client, name)
    else:
        assert promotion.promote(client, name).promoted
    assert live(client, name) == (3, 2)
    states = [record.state for record in promotion.history(client, name) if record.version == 3]
    assert states == (["done", "interrupted"] if 3 <= died_at < 6 else ["done"])
    assert turns(client, name) == (died_at == 9)  # nobody has needed it yet


# turn, sign of life, run, | champion, previous, end, turn
@pytest.mark.parametrize("died_at", range(7))
@pytest.mark.usefixtures("known_to_be_dead")
def test_an_interrupted_rollback_is_done_or_not_done(
    client: MlflowClient, add: Callable[..., int], name: str, died_at: int
) -> None:
    done = died_at >= 4
    for gain in (1.0, 1.5):
        add(gain)
        promotion.promote(client, name)
    with pytest.raises(Killed):
        promotion.rollback(DyingClient(client, died_at), name)
    assert live(client, name)[0] == (1 if done else 2)
    if done:
        assert promotion.rollback(client, name, dry_run=True).version == 2
        with pytest.raises(UsageError, match="is the champion"):
            promotion.rollback(client, name, to=1)
    else:
        promotion.rollback(client, name)
    assert live(client, name) == (1, 2)


def test_who_is_late_moves_nothing(
    client: MlflowClient, add: Callable[..., int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that takes longer than a turn lasts: others may have taken it for over."""
    add(1.0)
    open_record = promotion._open_record

    monkeypatch.setattr(promotion, "LEASE", 1.0)

    def slow(*arguments: Any) -> str:
        time.sleep(0.6)
        return open_record(*arguments)

    monkeypatch.setattr(promotion, "_open_record", slow)
    with pytest.raises(TeasrError, match=r"took too long to answer.*was not moved"):
        promotion.promote(client, name)
    assert live(client, name) == (None, None)


def test_a_turn_without_signs_of_life_is_over(
    client: MlflowClient, add: Callable[..., int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder is on another machine, where nobody can look."""
    monkeypatch.setattr(promotion, "LEASE", 4.0)
    add(1.0)
    client.create_registered_model(f"{name}.turns")
    client.create_model_version(f"{name}.turns", f"models:/{name}/1", tags={"teasr.place": "else"})
    began = time.monotonic()
    assert promotion.promote(client, name).promoted
    assert time.monotonic() - began > 3.0
    assert turns(client, name) == 0


def test_a_verdict_on_another_champion_is_no_verdict(
    client: MlflowClient, add: Callable[..., int], name: str
) -> None:
    add(1.0)
    between = promotion.contest(client, name)
    promotion.promote(client, name)
    version = add(1.5)
    with pytest.raises(TeasrError, match="changed meanwhile; nothing was done"):
        promotion.promote(client, name, between=promotion.Contest(version, between.champion))
    assert live(client, name) == (1, None)


def test_a_command_hears_of_a_change(
    client: MlflowClient, add: Callable[..., int], name: str, tmp_path: Path
) -> None:
    add(1.0)
    heard = tmp_path / "heard"
    say = f"echo $TEASR_MODEL $TEASR_VERSION [$TEASR_REPLACED] $TEASR_RECORD > '{heard}'"
    outcome = promotion.promote(client, name)
    assert promotion.run_hook(client, outcome, say) == "done"
    assert heard.read_text().split() == [name, "1", "[]", outcome.record]
    assert promotion.run_hook(client, outcome, "exit 3") == "failed (exit code 3)"
    assert outcome.record is not None
    assert client.get_run(outcome.record).data.tags["teasr.hook"] == "failed (exit code 3)"
    assert live(client, name) == (1, None)
    assert promotion.run_hook(client, outcome) is None
    add(0.5)
    assert promotion.run_hook(client, promotion.promote(client, name), say) is None  # refused


# ------------------------------------------------------------------------------ real processes


def promoter(uri: str, name: str, version: int, begin: float, answers: Any) -> None:
    """In a process of its own: promote `version` at `begin`."""
    client = MlflowClient(uri, uri)
    try:
        time.sleep(max(begin - time.time(), 0))
        answers.put((version, promotion.promote(client, name, version).promoted))
    except TeasrError as error:
        answers.put((version, str(error)))


def restless(uri: str, name: str) -> None:
    """In a process of its own: change the champion without end."""
    client = MlflowClient(uri, uri)
    while True:
        promotion.rollback(client, name)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with mlflow_server(port, tmp_path_factory.mktemp("server")):
            yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "teasr.promotion"])
    return context


def candidates(client: MlflowClient, name: str, count: int) -> list[int]:
    """A champion, and so many versions that are better."""
    add_version(client, name, 1.0)
    promotion.promote(client, name)
    return [add_version(client, name, 1.0 + i / 10) for i in range(1, count + 1)]


@pytest.mark.journey
def test_of_several_promotions_at_once_one_wins(server: str, processes: Any) -> None:
    client = MlflowClient(server, server)
    for round_ in range(3):
        name = f"race-{round_}"
        answers, begin = processes.Queue(), time.time() + 2
        runners = [
            processes.Process(target=promoter, args=(server, name, version, begin, answers))
            for version in candidates(client, name, 4)
        ]
        for runner in runners:
            runner.start()
        outcomes = dict(answers.get(timeout=120) for _ in runners)
        for runner in runners:
            runner.join(60)
        (winner,) = (version for version, outcome in outcomes.items() if outcome is True)
        assert all("nothing was done" in o for o in outcomes.values() if o is not True), outcomes
        assert live(client, name) == (winner, 1)
        records = [(r.version, r.replaced, r.state) for r in promotion.history(client, name)]
        assert records == [(winner, 1, "done"), (1, None, "done")]
        assert turns(client, name) == 0


@pytest.mark.journey
def test_killed_at_any_moment_a_change_is_done_or_not_done(server: str, processes: Any) -> None:
    client, name = MlflowClient(server, server), "killed"
    (other,) = candidates(client, name, 1)
    promotion.promote(client, name, other)
    for _ in range(8):
        runner: ForkServerProcess = processes.Process(target=restless, args=(server, name))
        runner.start()
        time.sleep(random.uniform(1.0, 2.5))
        runner.kill()
        runner.join(60)
        champion, _ = live(client, name)
        began = time.monotonic()
        back = promotion.rollback(client, name)  # ends what the dead process left
        assert time.monotonic() - began < promotion.LEASE / 2  # it is known to be dead
        assert (back.version, back.replaced) == ({1: 2, 2: 1}[champion or 0], champion)
        assert live(client, name) == (back.version, champion)
        assert turns(client, name) == 0
    records = list(reversed(promotion.history(client, name)))
    done = [record for record in records if record.state == "done"]
    assert {record.state for record in records} <= {"done", "interrupted"}
    # Each change follows from the one before: nothing is missing from the record.
    assert all(b.replaced == a.version for a, b in itertools.pairwise(done))
