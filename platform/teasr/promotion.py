"""What is live, and how it became so: promotion as a transaction over MLflow's registry.

Aliases say what a version is: `challenger` -> gate -> `champion`, and `previous` for the champion
before. The registry forgets what was live, so every promotion, refusal and rollback is a run of its
own in the experiment `teasr-promotions`, written before anything moves.

MLflow moves an alias without asking what it was, so changes of one model take turns. A turn is a
version of the registered model `NAME.turns`: MLflow numbers them, and whoever has the lowest number
is next. The turn is deleted when its holder is done; of a holder that died it counts as over when
its process is known to be gone, or 60 seconds after its last sign of life by the store's clock.
Inside its turn a process

1. ends what a dead one left (`champion` tells whether that was done: its record names the version),
2. looks whether the champion still is the one that the gate compared with,
3. writes its record, moves `champion`, then `previous`, and closes the record.

So two promotions at once cannot both win, and one that is cut off anywhere is done or not done.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

from teasr.errors import TeasrError, UsageError
from teasr.gate import GateSettings, Verdict, decide
from teasr.registry import (
    CHALLENGER,
    TURNS,
    aliases_of,
    required_evaluation,
    version_of,
    versions_for_people,
)
from teasr.tracking import experiment_id

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
PREVIOUS = "previous"
PROMOTIONS = "teasr-promotions"
HOOK_VARIABLE = "TEASR_ON_CHANGE"
"""A command that is run whenever a champion changed, see `run_hook`."""

LEASE = 60.0
"""Seconds without a sign of life after which a turn is over."""
_POLL = 0.1
_HOOK_SECONDS = 60

Action = Literal["promote", "rollback"]
State = Literal["done", "refused", "interrupted", "unfinished"]


@dataclass
class Record:
    """One promotion, refusal or rollback.

    Attributes:
        version: that became champion, or would have.
        replaced: the champion until then; None for the first.
        verdict: `passed`, `refused`, or `none` for a rollback, which asks no gate.
        at: UTC, ISO 8601.
        run_id: of the run that holds `verdict.json` and `verdict.md`.
        state: `done`; `refused`; `interrupted` before anything changed; `unfinished`: under way, or
            cut off so recently that no later promotion or rollback has settled it.
        report: URI of the gate's report, if there is one.
    """

    model: str
    version: int
    replaced: int | None
    action: Action
    verdict: str
    by: str
    at: str
    run_id: str
    state: State
    report: str | None = None


@dataclass
class Promotion:
    """Outcome of `promote` or `rollback`.

    Attributes:
        promoted: the champion is now `version`. False when the gate refused, or for a dry run.
        replaced: the champion before; None for the first.
        verdict: the gate's; None for a rollback.
        record: id of the promotion record's run; None for a dry run.
    """

    model: str
    version: int
    replaced: int | None
    promoted: bool
    verdict: Verdict | None
    record: str | None


@dataclass(frozen=True)
class Contest:
    """What the gate is asked about.

    Attributes:
        version: the candidate.
        champion: the version that it is compared with; None for the first.
    """

    version: int
    champion: int | None


def contest(client: MlflowClient, name: str, version: int | None = None) -> Contest:
    """Who would be compared by `promote`, with the same arguments and errors."""
    aliases = aliases_of(client, name)
    if version is None:
        if CHALLENGER not in aliases:
            raise UsageError(f"'{name}' has no challenger.", versions_for_people(client, name))
        version = aliases[CHALLENGER]
    version_of(client, name, version)
    champion = aliases.get(CHAMPION)
    if version == champion:
        raise UsageError(
            f"Version {version} of '{name}' is the champion.", versions_for_people(client, name)
        )
    return Contest(version, champion)


def judge(
    client: MlflowClient, name: str, between: Contest, gate: GateSettings | None = None
) -> Verdict:
    """The gate's verdict, from the evaluations of both versions.

    Raises:
        TeasrError: when a version has no evaluation.
    """
    opponent = None
    if between.champion is not None:
        opponent = required_evaluation(client, version_of(client, name, between.champion))
    candidate = required_evaluation(client, version_of(client, name, between.version))
    return decide(candidate, opponent, gate or GateSettings())


def promote(
    client: MlflowClient,
    name: str,
    version: int | None = None,
    gate: GateSettings | None = None,
    dry_run: bool = False,
    by: str | None = None,
    report: str | None = None,
    between: Contest | None = None,
) -> Promotion:
    """Ask the gate, and make `version` the champion when it passes. Recorded either way.

    Args:
        version: default: the `challenger`.
        gate: default: `GateSettings()`.
        dry_run: ask the gate and write nothing.
        by: who promotes; default: the user of this process.
        report: URI of a report of this verdict, noted in the record.
        between: from `contest`; with it nothing is done when the champion is no longer that one.

    Raises:
        UsageError: unknown model or version, no challenger, or the champion already.
        TeasrError: when a version has no evaluation, or the champion changed meanwhile.
    """
    if not dry_run:
        _mend(client, name)
    now = contest(client, name, version if between is None else between.version)
    if between is not None and between != now:
        raise _changed(name)
    verdict = judge(client, name, now, gate)
    outcome = Promotion(name, now.version, now.champion, False, verdict, None)
    if dry_run:
        return outcome
    if not verdict.passed:
        outcome.record = _open_record(client, outcome, "promote", by, report)
        client.set_terminated(outcome.record, "FINISHED")
        return outcome
    _change(client, outcome, "promote", by, report)
    return outcome


def rollback(
    client: MlflowClient,
    name: str,
    to: int | None = None,
    dry_run: bool = False,
    by: str | None = None,
) -> Promotion:
    """Make the `previous` champion (or version `to`) the champion again; no gate is asked.

    Recorded, and safe to interrupt, as `promote`. A second rollback undoes the first.

    Raises:
        UsageError: unknown model or version, or nothing to go back to.
        TeasrError: when the champion changed meanwhile.
    """
    if not dry_run:
        _mend(client, name)
    aliases = _settled(client, name, aliases_of(client, name))
    version = aliases.get(PREVIOUS) if to is None else to
    champion = aliases.get(CHAMPION)
    if version is None or champion is None:
        raise UsageError(
            f"'{name}' has no previous champion to go back to.", versions_for_people(client, name)
        )
    version_of(client, name, version)
    if version == champion:
        raise UsageError(
            f"Version {version} of '{name}' is the champion.", versions_for_people(client, name)
        )
    outcome = Promotion(name, version, champion, False, None, None)
    if not dry_run:
        _change(client, outcome, "rollback", by, None)
    return outcome


def history(client: MlflowClient, name: str) -> list[Record]:
    """Every promotion, refusal and rollback of `name`, newest first.

    Raises:
        UsageError: for an unknown model.
    """
    aliases_of(client, name)
    return [_record(run) for run in _record_runs(client, name)]


def champion_version(client: MlflowClient, name: str) -> int | None:
    """The version that is live, or None (`UsageError` for an unknown model)."""
    return aliases_of(client, name).get(CHAMPION)


def run_hook(client: MlflowClient, outcome: Promotion, command: str | None = None) -> str | None:
    """Run the command of `command`, or else of `$TEASR_ON_CHANGE`, after a champion changed.

    It is given to the shell with TEASR_MODEL, TEASR_VERSION, TEASR_REPLACED and TEASR_RECORD in its
    environment, and has a minute. A change stays whatever becomes of it.

    Returns:
        None without a command; else what became of it, which the record's tag `teasr.hook` keeps.
    """
    command = command or os.environ.get(HOOK_VARIABLE)
    if not command or not outcome.promoted or outcome.record is None:
        return None
    given = {
        "TEASR_MODEL": outcome.model,
        "TEASR_VERSION": str(outcome.version),
        "TEASR_REPLACED": str(outcome.replaced or ""),
        "TEASR_RECORD": outcome.record,
    }
    try:
        done = subprocess.run(
            command,
            shell=True,
            env=os.environ | given,
            timeout=_HOOK_SECONDS,
            stdin=subprocess.DEVNULL,
        )
        result = "done" if done.returncode == 0 else f"failed (exit code {done.returncode})"
    except subprocess.TimeoutExpired:
        result = f"failed (not done within {_HOOK_SECONDS} s)"
    client.set_tag(outcome.record, "teasr.hook", result)
    return result


# --------------------------------------------------------------------------- the change itself


def _change(
    client: MlflowClient, outcome: Promotion, action: Action, by: str | None, report: str | None
) -> None:
    name = outcome.model
    by = by or current_user()
    with _turn(client, name, outcome.version, f"{action} by {by}") as check:
        aliases = _settle(client, name, aliases_of(client, name))
        if aliases.get(CHAMPION) != outcome.replaced:
            raise _changed(name)
        record = outcome.record = _open_record(client, outcome, action, by, report)
        check()
        client.set_registered_model_alias(name, CHAMPION, str(outcome.version))
        _finish(client, name, record, outcome.version, outcome.replaced, aliases)
    outcome.promoted = True


def _finish(
    client: MlflowClient,
    name: str,
    record: str,
    version: int,
    replaced: int | None,
    aliases: dict[str, int],
) -> None:
    """What follows once `champion` has moved, and may be done twice."""
    if replaced is not None:
        client.set_registered_model_alias(name, PREVIOUS, str(replaced))
    if aliases.get(CHALLENGER) == version:
        client.delete_registered_model_alias(name, CHALLENGER)
    client.set_terminated(record, "FINISHED")


def _changed(name: str) -> TeasrError:
    return TeasrError(
        f"The champion of '{name}' changed meanwhile; nothing was done.", "Run it again."
    )


def _mend(client: MlflowClient, name: str) -> None:
    """Add what is missing of a change that was done and cut off."""
    aliases = aliases_of(client, name)
    for record in _open_records(client, name):
        if _was_done(record, aliases):
            with _turn(client, name, record.version, "end an interrupted change"):
                _settle(client, name, aliases_of(client, name))
            return


def _settle(client: MlflowClient, name: str, aliases: dict[str, int]) -> dict[str, int]:
    """In one's turn: end what interrupted changes left; the aliases as they then are."""
    for record in _open_records(client, name):
        if _was_done(record, aliases):
            _finish(client, name, record.run_id, record.version, record.replaced, aliases)
        else:
            refused = record.verdict == "refused"
            client.set_terminated(record.run_id, "FINISHED" if refused else "KILLED")
    return aliases_of(client, name)


def _settled(client: MlflowClient, name: str, aliases: dict[str, int]) -> dict[str, int]:
    """The aliases as `_settle` would leave them."""
    for record in _open_records(client, name):
        if _was_done(record, aliases) and record.replaced is not None:
            aliases = {**aliases, PREVIOUS: record.replaced}
    return aliases


def _was_done(record: Record, aliases: dict[str, int]) -> bool:
    return record.verdict != "refused" and aliases.get(CHAMPION) == record.version


# --------------------------------------------------------------------------- turns


@contextlib.contextmanager
def _turn(client: MlflowClient, name: str, version: int, purpose: str) -> Iterator[_Check]:
    """Wait for one's turn to change `name`; what is yielded says whether there is time left."""
    from mlflow.exceptions import MlflowException

    queue = name + TURNS
    mine, asked = _draw(client, queue, f"models:/{name}/{version}", purpose)
    number, made = int(mine.version), mine.creation_timestamp / 1000

    def sign() -> float:
        """Leave a sign of life in the turn; its time by the store's clock."""
        now = made + time.monotonic() - asked
        client.set_model_version_tag(queue, str(number), "teasr.alive", f"{now:.3f}")
        return now

    try:
        now = signed = made
        while True:
            ahead = [turn for turn in _turns(client, queue) if int(turn.version) < number]
            if all(_is_over(turn, now) for turn in ahead):
                break
            time.sleep(_POLL)
            now = made + time.monotonic() - asked
            if now - signed > LEASE / 6:
                signed = sign()
        for turn in ahead:
            _leave(client, turn)
        began = time.monotonic()
        sign()
        yield _Check(name, began)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise _late(name) from None
    finally:
        _leave(client, mine)


class _Check:
    """Ends the work of a holder whose turn others may take for over."""

    def __init__(self, name: str, began: float) -> None:
        self._name, self._began = name, began

    def __call__(self) -> None:
        if time.monotonic() - self._began > LEASE / 2:
            raise _late(self._name)


def _late(name: str) -> TeasrError:
    return TeasrError(
        f"The store took too long to answer; the champion of '{name}' was not moved.",
        "Run it again.",
    )


def _draw(
    client: MlflowClient, queue: str, source: str, purpose: str
) -> tuple[ModelVersion, float]:
    """A turn behind all others, and the moment before it was made."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            queue, description="Turns of promotions that are under way; see teasr.promotion."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    place, process = _whereabouts()
    tags = {"teasr.purpose": purpose, "teasr.place": place, "teasr.process": process}

    def is_race(error: BaseException) -> bool:
        # Several that draw at once may be given one number, which all but one cannot have.
        return isinstance(error, MlflowException) and error.error_code != "RESOURCE_DOES_NOT_EXIST"

    for attempt in Retrying(
        retry=retry_if_exception(is_race),
        stop=stop_after_delay(LEASE),
        wait=wait_random(0, 0.5),
        reraise=True,
    ):
        with attempt:
            asked = time.monotonic()
            made = client.create_model_version(queue, source=source, tags=tags)
    return made, asked


def _turns(client: MlflowClient, queue: str) -> list[ModelVersion]:
    return list(client.search_model_versions(f"name = '{queue}'"))


def _is_over(turn: ModelVersion, now: float) -> bool:
    """Whether the holder of `turn` is gone. `now`: seconds by the store's clock."""
    place, _ = _whereabouts()
    if turn.tags.get("teasr.place") == place and not _is_alive(turn.tags.get("teasr.process", "")):
        return True
    alive = float(turn.tags.get("teasr.alive") or turn.creation_timestamp / 1000)
    return now - alive > LEASE


def _leave(client: MlflowClient, turn: ModelVersion) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_model_version(turn.name, str(turn.version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # whoever came next took it for over
            raise


def _whereabouts() -> tuple[str, str]:
    """Where this process runs, and which it is there."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(Path("/proc/self/ns/pid").readlink().name)
    return " ".join(parts), f"{os.getpid()} {_started(os.getpid())}"


def _started(process: int) -> str:
    """What tells a process from a later one of its number; empty when it is not there."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _is_alive(process: str) -> bool:
    """Whether the process of `_whereabouts` of this place is there; unknown counts as there."""
    number, _, started = process.partition(" ")
    if not (number.isdecimal() and started):
        return True
    return _started(int(number)) == started


# --------------------------------------------------------------------------- records


def _open_record(
    client: MlflowClient, outcome: Promotion, action: Action, by: str | None, report: str | None
) -> str:
    verdict = outcome.verdict
    tags = {
        "teasr.model": outcome.model,
        "teasr.version": str(outcome.version),
        "teasr.replaced": "" if outcome.replaced is None else str(outcome.replaced),
        "teasr.verdict": "none" if verdict is None else "passed" if verdict.passed else "refused",
        "teasr.by": by or current_user(),
        "teasr.action": action,
        "teasr.at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if report is not None:
        tags["teasr.report"] = report
    run = client.create_run(
        experiment_id(client, PROMOTIONS),
        tags=tags,
        run_name=f"{action} {outcome.model} version {outcome.version}",
    )
    run_id = str(run.info.run_id)
    if verdict is not None:
        client.log_text(run_id, verdict.to_json(), "verdict.json")
        client.log_text(run_id, verdict.to_markdown(), "verdict.md")
    return run_id


def _open_records(client: MlflowClient, name: str) -> list[Record]:
    """Records that nobody has ended, oldest first."""
    runs = [run for run in _record_runs(client, name) if run.info.status == "RUNNING"]
    return [_record(run) for run in reversed(runs)]


def _record_runs(client: MlflowClient, name: str) -> list[Run]:
    """The record runs of `name`, newest first."""
    experiment = client.get_experiment_by_name(PROMOTIONS)
    if experiment is None:
        return []
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment.experiment_id],
            filter_string=f"tags.`teasr.model` = '{name}'",
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _record(run: Run) -> Record:
    tags = run.data.tags
    states: dict[str, State] = {"FINISHED": "done", "RUNNING": "unfinished"}
    state = states.get(run.info.status, "interrupted")
    if state == "done" and tags["teasr.verdict"] == "refused":
        state = "refused"
    return Record(
        model=tags["teasr.model"],
        version=int(tags["teasr.version"]),
        replaced=int(tags["teasr.replaced"]) if tags["teasr.replaced"] else None,
        action="rollback" if tags["teasr.action"] == "rollback" else "promote",
        verdict=tags["teasr.verdict"],
        by=tags["teasr.by"],
        at=tags["teasr.at"],
        run_id=run.info.run_id,
        state=state,
        report=tags.get("teasr.report"),
    )


def current_user() -> str:
    """Who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
