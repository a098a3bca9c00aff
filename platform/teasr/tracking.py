"""Where runs live, and how training writes to them without depending on it.

One machine needs no server: runs are in `HOME/mlflow.db`, their files in `HOME/artifacts`. A
cluster sets `MLFLOW_TRACKING_URI`. MLflow takes seconds to import and is imported on use only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from teasr.errors import TeasrError, UsageError
from teasr.shards import library_versions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from PIL.Image import Image

_ANSWER_SECONDS = 3
_BATCH = 1000  # MLflow's limit of metrics in one `log_batch`
_PICTURES = 20  # that wait at most: they are looked at, and no figure is lost with them
_DATABASE = "mlflow.db"
_URI_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_log = logging.getLogger(__name__)


def home() -> Path:
    """Folder of this project's runs and models, absolute: `$TEASR_HOME`, else `./teasr-home`."""
    return Path(os.environ.get("TEASR_HOME") or "teasr-home").expanduser().absolute()


_home = home  # for the functions below that have a parameter of that name


def tracking_uri(home: Path) -> str:
    """`$MLFLOW_TRACKING_URI`, else the database in `home`, which is created as a folder."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    home = home.expanduser().absolute()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise UsageError(f"{home} cannot be created: {reason}.", "Set TEASR_HOME.") from None
    return f"sqlite:///{home / _DATABASE}"


def store_exists(home: Path | None = None) -> bool:
    """Whether there is a store of `home` (default: `home()`) to ask without creating one."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return True
    return ((home or _home()) / _DATABASE).exists()


def connect(home: Path | None = None) -> MlflowClient:
    """A client of the store of `home` (default: `home()`); also MLflow's own default from here on.

    The store is opened: a new database is created, and a server must answer within seconds.

    Raises:
        UsageError: for a URI that is no database and no server.
        TeasrError: when the store cannot be opened, a server does not answer or refuses us.
    """
    uri = tracking_uri(home or _home())
    keep_mlflow_quiet()
    import mlflow

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file"):
        raise UsageError(
            f"MLFLOW_TRACKING_URI={uri} is a folder, which MLflow no longer uses as a store.",
            "Name a database (sqlite:////path/mlflow.db) or a server (http://...), or unset it.",
        )
    if scheme in ("http", "https"):
        _check_server(uri)
    registry_uri = os.environ.get("MLFLOW_REGISTRY_URI") or uri
    # MLflow exports both, and a later `connect` would take them for the user's wish.
    exported = {name: os.environ.get(name) for name in _URI_VARIABLES}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(registry_uri)
    for name, value in exported.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        with _creation_lock(uri):
            client = mlflow.MlflowClient(uri, registry_uri)
            client.search_experiments(max_results=1)
            client.search_registered_models(max_results=1)
    except Exception as error:  # drivers raise errors of their own
        reason = mask_credentials(first_line(error)).replace(uri, mask_credentials(uri))
        raise TeasrError(
            f"The MLflow store at {mask_credentials(uri)} cannot be opened: {reason}."
        ) from None
    return client


def keep_mlflow_quiet() -> None:
    """Before MLflow is imported, which is when it reads these: no reports to its makers, no bars.

    What the user set stays.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def mask_credentials(url: str) -> str:
    """`url` (or a text that holds some) with `user:password@` replaced by `***@`."""
    return re.sub(r"(?<=://)[^/\s]+@", "***@", url)


def answers(uri: str, timeout: float = _ANSWER_SECONDS) -> bool:
    """Whether an MLflow server can be asked at `uri` now. A database always can."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return True
    try:
        return _status(uri, timeout) < 500
    except Exception:  # refused, timed out, unknown host, TLS: the server is of no use now
        return False


def experiment_id(client: MlflowClient, name: str, home: Path | None = None) -> str:
    """Id of the experiment `name`, created when missing; safe to call from several processes.

    A server decides where its artifacts go. With a database, they go to `artifacts` in `home`
    (default: the folder of an sqlite database, else `home()`), not to MLflow's `./mlruns`.

    Raises:
        TeasrError: when the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    existing = client.get_experiment_by_name(name)
    if existing is None:
        try:
            return client.create_experiment(name, _artifact_location(client.tracking_uri, home))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            existing = client.get_experiment_by_name(name)  # another process was first
    if existing is None or existing.lifecycle_stage != "active":
        raise TeasrError(
            f"The experiment '{name}' is in MLflow's trash.",
            "Restore it (mlflow experiments restore) or purge it (mlflow gc).",
        )
    return existing.experiment_id


def git_commit() -> str | None:
    """Commit that this code was run from, with `-dirty` when tracked files differ from it.

    `$TEASR_COMMIT` comes first: a cluster runs a copy without its repository. None when unknown.
    """
    given = os.environ.get("TEASR_COMMIT")
    if given:
        return given
    folder = Path(__file__).parent
    # A wheel installed inside somebody else's repository is not a commit of ours.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a training makes."""
    found = library_versions()
    for name in ("torch", "deepspeed", "ray", "mlflow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


class RunLogger:
    """Writes metrics and pictures to a run from its own thread: training neither waits for MLflow
    nor fails.

    While the store is away, metrics are kept and tried again; beyond `capacity` the oldest are
    dropped and counted. Used by rank 0 only. Close it, or use it as a context manager.

    Args:
        capacity: metrics kept at most.
        interval: seconds between writes.
    """

    def __init__(
        self, client: MlflowClient, run_id: str, capacity: int = 100_000, interval: float = 2.0
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._capacity = capacity
        self._interval = interval
        self._waiting: deque[Metric] = deque()
        self._sending: list[Metric] = []
        self._pictures: deque[tuple[str, Image]] = deque(maxlen=_PICTURES)
        self._lost = 0
        self._trouble = "the store was too slow"
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="run-logger", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Metrics dropped so far."""
        return self._lost

    @property
    def waiting(self) -> int:
        """Metrics not written yet."""
        return len(self._sending) + len(self._waiting)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note `values` of `step`. Returns at once, and never raises for the store's sake."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with self._lock:
            self._waiting.extend(Metric(name, float(v), now, step) for name, v in values.items())
            while len(self._waiting) > self._capacity:
                self._waiting.popleft()
                self._lost += 1

    def log_image(self, path: str, picture: Image) -> None:
        """Note a picture for the run's artifacts; as `log`, but of pictures that wait only the
        newest are kept.

        Args:
            path: among the artifacts; its suffix says the format.
        """
        with self._lock:
            self._pictures.append((path, picture))

    def close(self, timeout: float = 60) -> str:
        """Write what waits, trying for at most `timeout` seconds.

        Returns:
            What was lost, one sentence for people; empty when everything was written.
        """
        deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout)
        if not self._thread.is_alive():  # else it is stuck in a write, and this thread would be too
            while not self._flush() and time.monotonic() < deadline:
                time.sleep(min(1.0, self._interval))
        self._lost += self.waiting
        self._waiting.clear()
        self._sending = []
        if not self._lost:
            return ""
        message = f"{self._lost} metrics of run {self._run_id} were lost ({self._trouble})."
        _log.warning(message)
        return message

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while not self._closing.wait(self._interval):
            self._flush()

    def _flush(self) -> bool:
        """Write everything that waits; False when the store is away."""
        while True:
            with self._lock:
                while self._waiting and len(self._sending) < _BATCH:
                    self._sending.append(self._waiting.popleft())
            if not self._sending:
                return self._write_pictures()
            if not self._write(self._sending):
                return False
            self._sending = []

    def _write(self, batch: list[Metric]) -> bool:
        from mlflow.exceptions import MlflowException

        # Asked first, because MLflow's own retries would hold this thread, and `close`, for
        # minutes.
        if not answers(self._client.tracking_uri):
            self._trouble = "the MLflow server did not answer"
            return False
        try:
            self._client.log_batch(self._run_id, metrics=batch)
        except Exception as error:
            self._trouble = mask_credentials(first_line(error))
            if not isinstance(error, MlflowException) or error.get_http_status_code() >= 500:
                return False
            # Refused for good (a deleted run, a wrong name): kept, it would block all that follows.
            with self._lock:
                self._lost += len(batch)
        return True

    def _write_pictures(self) -> bool:
        """Write the pictures that wait; False when the store is away."""
        while self._pictures:
            if not answers(self._client.tracking_uri):
                return False
            path, picture = self._pictures[0]
            try:
                self._client.log_image(self._run_id, picture, path)
            except Exception as error:  # of whatever store: it may refuse pictures alone
                _log.warning("%s was not written: %s", path, mask_credentials(first_line(error)))
            with self._lock:
                if self._pictures and self._pictures[0][0] == path:
                    self._pictures.popleft()
        return True


def _check_server(uri: str) -> None:
    shown = mask_credentials(uri)
    try:
        status = _status(uri, _ANSWER_SECONDS)
    except Exception as error:
        if "SSLError" in str(error):
            raise TeasrError(
                f"The certificate of the MLflow server at {shown} is not trusted.",
                "Set MLFLOW_TRACKING_SERVER_CERT_PATH.",
            ) from None
        status = 503
    if status in (401, 403):
        raise TeasrError(
            f"The MLflow server at {shown} refuses the credentials (HTTP {status}).",
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
        )
    if status == 404:
        raise TeasrError(
            f"There is no MLflow server at {shown} (HTTP 404).", "Check MLFLOW_TRACKING_URI."
        )
    if status >= 500:
        raise TeasrError(
            f"The MLflow server at {shown} does not answer.",
            "Start it or correct MLFLOW_TRACKING_URI; unset it to use a database on this machine.",
        )


def _status(uri: str, timeout: float) -> int:
    """HTTP status of a small question, asked at most twice with `timeout` seconds each."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    response = http_request(
        get_default_host_creds(uri),
        "/api/2.0/mlflow/experiments/search?max_results=1",
        "GET",
        timeout=timeout,
        max_retries=1,
        backoff_factor=0,
        raise_on_status=False,
    )
    return int(response.status_code)


@contextlib.contextmanager
def _creation_lock(uri: str) -> Iterator[None]:
    """Two processes that create one sqlite database would trip over each other's tables."""
    path = _sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=120):
            yield
    except Timeout:
        raise TeasrError(f"Another process has held {path}.lock for two minutes.") from None


def _sqlite_path(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None


def _artifact_location(uri: str, home: Path | None) -> str | None:
    if urlsplit(uri).scheme in ("http", "https"):
        return None
    database = _sqlite_path(uri)
    folder = home or (database.parent if database else _home())
    return (folder.expanduser().absolute() / "artifacts").as_uri()


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def first_line(error: Exception) -> str:
    """Of what an error of a library says; its name when it says nothing."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
