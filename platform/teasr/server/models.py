"""The model that is served, and its replacement while the server runs.

Only safetensors and JSON are read, and compared with what was noted when they were logged; no code
of a version is run. A new version is loaded and warmed beside the old one, which stays in use
until then and by those who already hold it. What fails is told, and the old version stays.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import numpy as np

from teasr import registry
from teasr.backbones import Model, load_model
from teasr.errors import TeasrError
from teasr.restoration import RestorationSettings, restore
from teasr.tracking import answers, first_line, home, mask_credentials, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

_RETRY_SECONDS = 60.0  # until a version that could not be loaded is tried again
_WARM_SIDE = 64
_log = logging.getLogger(__name__)

Outcome = Literal["same", "new", "failed", "away"]
"""Of a look at where a name points: nothing new, a new version in use, one that could not be
loaded, or no answer from the store."""


@dataclass(frozen=True)
class Served:
    """A loaded model.

    Attributes:
        asked: as for `teasr.registry.resolve`, such as `models:/teasr@champion`.
        found: where that was when it was loaded.
        since: when it was loaded, ISO 8601 in UTC.
    """

    asked: str
    found: registry.Found
    since: str
    model: Model

    @property
    def version(self) -> str:
        """`teasr version 3`."""
        return self.found.label

    @property
    def alias(self) -> str | None:
        """`champion`; None for what is named by number, folder or built-in name."""
        return self.asked.rpartition("@")[2] if _is_alias(self.asked) else None


class ModelSource:
    """What a name means now, and what it meant when it was last loaded.

    Args:
        asked: as for `teasr.registry.resolve`.
        client: default `connect()`, when MLflow is needed to find the model.

    Attributes:
        current: loaded, warmed and in use.
        failure: why the last look or load failed, one sentence; None when it did not.

    Raises:
        TeasrError: as of `teasr.registry.resolve` and `load_model`, on construction.
    """

    def __init__(self, asked: str, client: MlflowClient | None = None) -> None:
        self._asked = asked
        self._client = client
        self._refused: registry.Found | None = None
        self._again = 0.0
        self._wake = threading.Event()
        self._closed = False
        self.failure: str | None = None
        self.current = self._load(registry.find(asked, client))

    def refresh(self, force: bool = False) -> Outcome:
        """Look where the name points, and load what is new there.

        Args:
            force: load even what is the same, or has just failed.
        """
        found = None
        try:
            self._ask_store()
            found = registry.find(self._asked, self._client)
            same = found == self.current.found
            refused = self._refused is not None and self._refused == found
            if same and not force:
                self.failure = self._refused = None
                return "same"
            if refused and not force and time.monotonic() < self._again:
                return "same"
            self.current = self._load(found)
        except Exception as error:  # a store away, a file damaged: the old version goes on
            told = str(error) if isinstance(error, TeasrError) else f"{first_line(error)}."
            what = f"{found.label} could not be loaded" if found else "The store could not be asked"
            failure = f"{what}: {mask_credentials(told)}"
            if failure != self.failure:
                _log.error("%s %s stays in use.", failure, self.current.version)
            self.failure = failure
            self._refused, self._again = found, time.monotonic() + _RETRY_SECONDS
            return "failed" if found else "away"
        self.failure = self._refused = None
        _log.warning("%s is in use.", self.current.version)
        return "new"

    def watch(self, seconds: float, told: Callable[[Outcome], None]) -> None:
        """Refresh again and again in a thread: every `seconds` for an alias, and when `wake` asks.

        Args:
            told: called with each outcome.
        """
        interval = seconds if _is_alias(self._asked) else None

        def run() -> None:
            while True:
                force = self._wake.wait(interval)
                self._wake.clear()
                if self._closed:
                    return
                told(self.refresh(force))

        threading.Thread(target=run, name="model", daemon=True).start()

    def wake(self) -> None:
        """Have the watching thread load the model anew, now."""
        self._wake.set()

    def close(self) -> None:
        """End the watching thread."""
        self._closed = True
        self._wake.set()

    def _ask_store(self) -> None:
        """Fail within seconds, where MLflow's client would try for minutes."""
        if self._asked.startswith(("models:/", "runs:/")):
            uri = tracking_uri(home())
            if not answers(uri):
                raise TeasrError(f"{uri} does not answer.")

    def _load(self, found: registry.Found) -> Served:
        model = load_model(registry.checked_weights(found))
        model.network.fuse()
        # The first picture takes longer: libraries choose and prepare their kernels.
        side = min(_WARM_SIDE, model.network.tile)
        restore(
            model.network,
            np.zeros((side, side, 3), np.uint8),
            RestorationSettings(),
            codec=model.codec,
        )
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return Served(self._asked, found, since, model)


def _is_alias(asked: str) -> bool:
    return asked.startswith("models:/") and "@" in asked
