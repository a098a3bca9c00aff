"""MLflow's own server and pages on the runs of one working folder.

It listens on loopback. Elsewhere it must be asked for a password: whoever writes to the registry
decides what is served. The password comes from the environment that the server is started with and
is written nowhere; MLflow keeps a hash of it in `auth.db` beside the runs.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import time
from pathlib import Path

from teasr.errors import TeasrError, UsageError
from teasr.processes import check_port, start_mlflow, stop_group
from teasr.tracking import answers

USER_VARIABLE = "MLFLOW_TRACKING_USERNAME"
PASSWORD_VARIABLE = "MLFLOW_TRACKING_PASSWORD"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LEAST_PASSWORD = 12  # characters, MLflow's own rule
_LOG_TAIL = 15

_AUTH = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{database}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


class TrackingServer:
    """`mlflow server` as a context manager: up on entry, every process of it gone on exit.

    Args:
        home: folder of the runs.
        host: address to listen on; other than loopback only with `auth`.
        auth: ask everybody for a name and a password; the administrator's are
            $MLFLOW_TRACKING_USERNAME and $MLFLOW_TRACKING_PASSWORD.
        timeout: seconds to wait for the server to come up.

    Attributes:
        url: `http://127.0.0.1:PORT`.
        log: file with the server's output.
    """

    def __init__(
        self,
        home: Path,
        port: int = 5000,
        *,
        host: str = "127.0.0.1",
        auth: bool = False,
        timeout: float = 180,
    ) -> None:
        self.home = home.expanduser().absolute()
        self.port, self.host, self.auth, self.timeout = port, host, auth, timeout
        self.url = f"http://{host}:{port}"
        self.log = self.home / "logs" / "mlflow.log"

    def __enter__(self) -> TrackingServer:
        """Start the server and wait until it answers.

        Raises:
            UsageError: another address than loopback without `auth`; `auth` without a name and a
                password, or without what MLflow needs for it.
            TeasrError: when the port is taken, or the server dies or stays silent, with its last
                lines.
        """
        if self.host not in LOOPBACK and not self.auth:
            raise UsageError(
                f"--host {self.host} would let everybody on the network change runs and models.",
                "Add --auth, or reach it through an SSH tunnel.",
            )
        check_port(self.host, self.port)
        environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
        environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # of processes not needed here
        arguments = ["server", "--host", self.host, "--port", str(self.port), "--workers", "1"]
        arguments += ["--backend-store-uri", f"sqlite:///{self.home / 'mlflow.db'}"]
        arguments += ["--artifacts-destination", str(self.home / "artifacts")]
        if self.auth:
            environment |= self._credentials()
            arguments += ["--app-name", "basic-auth"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._process = start_mlflow(arguments, self.log, environment)
        try:
            self._await()
        except BaseException:
            stop_group(self._process)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        stop_group(self._process)

    def wait(self) -> None:
        """Block until the server ends by itself.

        Raises:
            TeasrError: when it does, with its last lines.
        """
        status = self._process.wait()
        raise TeasrError(f"The MLflow server ended (status {status}).", self._tail())

    def _credentials(self) -> dict[str, str]:
        """What the server's environment needs to ask for passwords."""
        if importlib.util.find_spec("flask_wtf") is None:
            raise UsageError("--auth needs MLflow's extra.", "Do: pip install 'mlflow[auth]'")
        name, password = (os.environ.get(key, "") for key in (USER_VARIABLE, PASSWORD_VARIABLE))
        if not name or len(password) < _LEAST_PASSWORD:
            raise UsageError(
                f"--auth takes the administrator's name from ${USER_VARIABLE} and a password of "
                f"{_LEAST_PASSWORD} characters or more from ${PASSWORD_VARIABLE}.",
                "Set both; clients use the same variables.",
            )
        self.home.mkdir(parents=True, exist_ok=True)
        settings = self.home / "auth.ini"
        settings.write_text(_AUTH.format(database=self.home / "auth.db"))
        return {
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_AUTH_ADMIN_USERNAME": name,
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        }

    def _await(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if (status := self._process.poll()) is not None:
                raise TeasrError(
                    f"The MLflow server did not start (status {status}).", self._tail()
                )
            if answers(self.url, timeout=1):
                return
            time.sleep(0.2)
        raise TeasrError(
            f"The MLflow server did not answer within {self.timeout:.0f} s.", self._tail()
        )

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return "Its last lines:\n" + "\n".join(lines[-_LOG_TAIL:])
