"""MLflow's own server as teasr starts it: who may reach it, and what it keeps to itself."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import requests

from teasr import tracking
from teasr.errors import TeasrError, UsageError
from teasr.tracking_server import PASSWORD_VARIABLE, USER_VARIABLE, TrackingServer
from tests.ports import free_port

PASSWORD = "wQ7-correct-horse"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "TEASR_HOME")
    for name in (*stores, USER_VARIABLE, PASSWORD_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_what_is_open_to_the_network_asks_for_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(UsageError, match=r"0\.0\.0\.0 would let everybody.*--auth"),
        TrackingServer(tmp_path, host="0.0.0.0"),
    ):
        pass
    monkeypatch.setenv(USER_VARIABLE, "admin")
    for given in ("", "short"):
        monkeypatch.setenv(PASSWORD_VARIABLE, given)
        with (
            pytest.raises(UsageError, match=f"12 characters or more from .{PASSWORD_VARIABLE}"),
            TrackingServer(tmp_path, host="0.0.0.0", auth=True),
        ):
            pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TeasrError, match=f"Port {port}"), TrackingServer(tmp_path, port):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.journey
def test_a_server_with_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tracking.connect(tmp_path)
    before.create_registered_model("known")
    monkeypatch.setenv(USER_VARIABLE, "ann")
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    with TrackingServer(tmp_path, free_port(), auth=True) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        client = tracking.connect()
        assert [model.name for model in client.search_registered_models()] == ["known"]
        run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
        client.log_text(run, "through the server", "note.txt")

        question = f"{server.url}/api/2.0/mlflow/registered-models/search"
        assert requests.get(question, timeout=10).status_code == 401
        assert requests.get(question, auth=("ann", PASSWORD), timeout=10).status_code == 200
        with socket.socket() as elsewhere:  # an address of this machine other than loopback's
            elsewhere.settimeout(5)
            assert elsewhere.connect_ex((_other_address(), server.port)) != 0
        monkeypatch.setenv(PASSWORD_VARIABLE, "another-password")
        with pytest.raises(TeasrError, match="refuses the credentials"):
            tracking.connect()
        port = server.port
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)) != 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert server.log in files and any(path.name == "note.txt" for path in files)
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]


def _other_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # no packet is sent
        except OSError:
            return "127.0.0.2"  # all that a machine without a network has; also not listened on
        return str(probe.getsockname()[0])
