"""`teasr status`: each part from real stores, and each fails by itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from jobs import status
from jobs.locks import only_one
from jobs.record import LOSSES_FILE, PROGRESS_FILE, RUN_FILE, last_loss
from jobs.schedule_metrics import EXPORTED, Records
from jobs.schedule_store import Schedule, Store
from jobs.status_screen import ago, duration, screen, size
from pipelines.ingest import ingest
from teasr import promotion, registry, tracking
from teasr.backbones import PRESETS, DualBranchDiT, save_model
from teasr.images import encode
from tests.ports import free_port
from tests.registry.figures import evaluation

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEASR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "home"


def shown(found: status.Status, width: int = 100) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(screen(found))
    return console.export_text()


# ---------------------------------------------------------------- trainings


def begin_run(home: Path, name: str, ago: float, now: datetime = NOW, **run: object) -> None:
    """A run whose last step was `ago` seconds before `now`."""
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    (folder / RUN_FILE).write_text(json.dumps({"run_id": "r", "finished": False, **run}))
    lines = [{"step": step, "samples": [0, 4], "total": 1 / step} for step in (1, 2, 4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / LOSSES_FILE).write_text(text + '{"step": 5, "tot')  # cut off
    progress = {
        **{"progress": 0.25, "steps": 4, "seconds": 60.0},
        "values": {"samples_per_second": 8.0, "share_waiting_for_data": 0.5, "loss/total": 0.3},
    }
    (folder / PROGRESS_FILE).write_text(json.dumps(progress))
    for path in folder.iterdir():
        os.utime(path, (now.timestamp() - ago,) * 2)


def test_runs_train_idle_or_are_forgotten(home: Path) -> None:
    begin_run(home, "now", ago=3)
    begin_run(home, "slow-steps", ago=400)
    slow = home / "runs" / "slow-steps" / PROGRESS_FILE
    slow.write_text(slow.read_text().replace("60.0", "600.0"))  # 150 s a step
    os.utime(slow, (NOW.timestamp() - 400,) * 2)
    begin_run(home, "hangs", ago=1200)
    begin_run(home, "long-ago", ago=10 * 86400)
    begin_run(home, "done", ago=5, finished=True)
    found = status.trainings(home, NOW)
    assert [(one.name, one.trains) for one in found.open] == [
        *(("now", True), ("slow-steps", True), ("hangs", False))
    ]
    now = found.open[0]
    assert (now.step, now.loss, now.progress, now.samples_per_second) == (4, 0.25, 0.25, 8.0)
    assert now.seconds_left == 180 and found.stale == 1
    text = shown(status.Status(str(home), NOW.isoformat(), trainings=found))
    for part in ("step 4, 25%", "8.0 samples/s", "3 min left", "no step for 20 min", "1 stopped"):
        assert part in text


def test_last_loss_of_a_long_file_is_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / LOSSES_FILE
    assert last_loss(path) is None
    path.write_text('{"step": 1')
    assert last_loss(path) is None
    path.write_text("".join(json.dumps({"step": i, "x": "y" * 90}) + "\n" for i in range(5000)))
    line = last_loss(path)
    assert line is not None and line["step"] == 4999


# ---------------------------------------------------------------- data


def test_data_grow_by_what_was_written_lately(
    home: Path, tmp_path: Path, photo: Callable[..., object], ray_session: None
) -> None:
    album = tmp_path / "album"
    album.mkdir()
    for i in range(3):
        (album / f"{i}.png").write_bytes(encode(photo(70, 80, seed=i)))  # type: ignore[arg-type]
    (album / "broken.png").write_bytes(b"no picture")
    made = ingest([str(album)], str(home / "data" / "kitchen" / "train"), shard_size=1)
    folder = home / "data" / "kitchen" / "train"
    first, *_ = sorted(folder.glob("*.tar"))
    moment = datetime.now(UTC)
    old = moment - timedelta(days=30)
    os.utime(first, (old.timestamp(),) * 2)
    found = status.data(home, moment)
    assert found is not None and found.disk_free and found.disk_free > 0
    (one,) = found.datasets
    assert (one.name, one.kind, one.samples, one.quarantined) == ("kitchen/train", "hr", 3, 1)
    assert one.bytes == made.bytes and one.recent_samples == 2
    assert one.recent_bytes == made.bytes - first.stat().st_size
    assert one.newest is not None and datetime.fromisoformat(one.newest) > old


# ---------------------------------------------------------------- stores


def promoted_and_refused(home: Path, tmp_path: Path) -> None:
    """Three versions: two that were champions, and one that was refused."""
    network = DualBranchDiT(PRESETS["teasr-xs"])
    save_model(network, network.state_dict(), tmp_path / "weights")
    client = tracking.connect(home)
    for gain in (1.0, 2.0, 0.5):
        run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
        uri = registry.log_model(client, run, tmp_path / "weights")
        registry.register(client, run, uri, "kitchen", evaluation(gain), {})
        promotion.promote(client, "kitchen", by="Ada")


def test_champions_and_schedules_are_told_and_exported(home: Path, tmp_path: Path) -> None:
    assert status.models(home) is None and status.retrainings(home, NOW) is None
    assert not home.exists()  # a look creates nothing
    promoted_and_refused(home, tmp_path)
    store = Store(home)
    store.add(Schedule("nightly", "r.yaml", (), ".", "kitchen", cron="0 3 * * *", added="then"))
    for state, minutes in (("promoted", 20), ("failed", 10)):
        store.ask("nightly", "time")
        number = store.runs()[-1].id
        ended = NOW - timedelta(minutes=minutes)
        began = (ended - timedelta(minutes=5)).isoformat()
        store.change(number, state=state, started=began, ended=ended.isoformat(), detail="why")
    store.ask("nightly", "new data")

    (model,) = status.models(home) or ()
    assert (model.model, model.champion, model.by, model.challenger) == ("kitchen", 2, "Ada", 3)
    assert model.changes == {"promoted": 2, "refused": 1, "rolled back": 0}
    assert model.last is not None and (model.last.version, model.last.state) == (3, "refused")
    with only_one(home / "kitchen.lock", "A retraining"):
        found = status.retrainings(home, NOW)
    assert found is not None and list(found.running) == ["kitchen"] and found.service is None
    assert [one.state for one in found.last] == ["waiting", "failed", "promoted"]
    assert found.schedules[0].coming == "2026-11-29T03:00:00+00:00"
    both = status.Status(str(home), NOW.isoformat(), retrainings=found, models=(model,))
    text = shown(both, 140)
    for part in ("is retrained now", "failed", "10 min ago", "why", "does not run", "version 2"):
        assert part in text
    assert "last: version 3 refused" in text and "by Ada" in text

    told = exported(home)
    assert told['teasr_retrainings_total{schedule="nightly",state="failed"}'] == 1
    ended = told['teasr_retraining_ended_time_seconds{schedule="nightly",state="failed"}']
    assert ended == (NOW - timedelta(minutes=10)).timestamp()
    assert told['teasr_retraining_open{schedule="nightly",state="waiting"}'] == 1
    assert told['teasr_champion_version{model="kitchen"}'] == 2
    assert told['teasr_champion_changes_total{model="kitchen",outcome="refused"}'] == 1
    assert {name.partition("{")[0] for name in told} == set(EXPORTED)


def exported(home: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(Records(home))
    lines = generate_latest(registry).decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_a_server_that_is_away_hides_nothing_else(
    home: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_run(home, "tiny", ago=0, now=datetime.now(UTC))
    Store(home)
    away = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:s3cret@{away}")
    monkeypatch.setenv("RAY_ADDRESS", away)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://{away}")
    code, out, err = run("status", "--json")
    assert code == 0 and "s3cret" not in out + err
    found = json.loads(out)
    assert set(found["troubles"]) == {"cluster", "jobs", "models"}
    assert away in found["troubles"]["cluster"] and "does not answer" in found["troubles"]["models"]
    assert found["data"]["datasets"] == [] and found["trainings"]["open"][0]["name"] == "tiny"
    assert found["retrainings"]["schedules"] == []
    assert exported(home)['teasr_records_up{source="registry"}'] == 0
    assert exported(home)['teasr_records_up{source="schedule"}'] == 1

    code, out, _ = run("status")
    assert code == 0 and "No Ray cluster answers" in out and "tiny" in out


def test_a_part_that_does_not_come_back_is_not_waited_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "models", lambda _: time.sleep(60))
    monkeypatch.setattr(status, "cluster", lambda _: None)
    began = time.monotonic()
    found = status.collect(home, patience=2)
    assert time.monotonic() - began < 10
    assert found.troubles["models"] == "no answer within 2 s" and found.data is None


@pytest.mark.parametrize(
    ("seconds", "told"), [(5, "5 s"), (600, "10 min"), (7200, "2.0 h"), (10**6, "12 d")]
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told
    assert ago(NOW.isoformat(), (NOW + timedelta(seconds=seconds)).isoformat()) == f"{told} ago"


def test_sizes() -> None:
    assert [size(n) for n in (None, 0, 1500, 25e9)] == ["?", "0 B", "1.5 kB", "25 GB"]
