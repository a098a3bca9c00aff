"""Patience with storage: what passes is waited for, what does not is said at once.

A disk across a network or a bucket now and then resets a connection, asks to slow down or is away
for a minute. Every read and write of a dataset goes through `patiently`, so that such a minute does
not cost a job its hours. Drivers (s3fs, gcsfs, ...) try again too, but for seconds.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import tenacity

from teasr.errors import TeasrError, UsageError

PATIENCE_SECONDS = 90.0
"""How long storage that fails is tried again; `TEASR_STORAGE_PATIENCE` gives another number."""

LEAST_TRIES = 3
"""Tried as often as this even when one try takes longer than all the patience, as uploads do."""

# Each wait is drawn between 0 and a bound that doubles, so that many workers do not return at once.
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 15.0

Result = TypeVar("Result")
log = logging.getLogger(__name__)

_TRANSIENT_ERRNOS = {
    errno.EAGAIN,
    errno.EBUSY,  # s3fs: SlowDown, ServiceUnavailable
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.EREMOTEIO,  # s3fs: InternalError
    errno.ESTALE,
    errno.ETIMEDOUT,
}
_TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504}

# By name: the drivers are optional, and what is not installed raises nothing.
_TRANSIENT_CLASSES = {
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",  # a gateway's page in place of an answer
    "urllib3.exceptions.IncompleteRead",
}
_NOTHING_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class StorageAway(TeasrError):  # noqa: N818 - named as `shards.BadShard` is
    """Storage failed for as long as it was tried; the same command may succeed later."""


class StorageRefused(TeasrError):  # noqa: N818 - named as `shards.BadShard` is
    """Storage said no: no rights, wrong credentials, no room. Trying again changes nothing."""


def patiently(doing: str, action: Callable[[], Result]) -> Result:
    """The result of `action`, which is tried again while storage fails in a way that passes.

    Args:
        doing: what is done and where, such as 'read s3://bucket/hr/hr-00000.tar'.
        action: one operation that may be done twice: a whole read, a whole write, a listing.

    Raises:
        StorageAway: when it still fails after `PATIENCE_SECONDS` and `LEAST_TRIES`.
        StorageRefused: when it fails in a way that does not pass.
        FileNotFoundError, NotADirectoryError, IsADirectoryError: as they come; what an absent
            file means is the caller's to say.
    """

    def warn(state: tenacity.RetryCallState) -> None:
        assert state.outcome and state.next_action
        log.warning(
            "Cannot %s: %s. Trying again in %.1f s.",
            doing,
            reason_of(state.outcome.exception()),
            state.next_action.sleep,
        )

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS),
        stop=tenacity.stop_all(
            tenacity.stop_after_attempt(LEAST_TRIES), tenacity.stop_before_delay(_patience())
        ),
        before_sleep=warn,
    )
    try:
        return attempts(action)
    except tenacity.RetryError as error:
        last = error.last_attempt
        seconds = attempts.statistics["delay_since_first_attempt"]
        raise StorageAway(
            f"Cannot {doing}: {reason_of(last.exception())} "
            f"(tried {last.attempt_number} times in {seconds:.0f} s).",
            "When the storage answers again, run the same command again: it goes on where it "
            "stopped.",
        ) from None
    except _NOTHING_THERE:
        raise
    except Exception as error:
        if not _is_of_storage(error):
            raise
        raise StorageRefused(f"Cannot {doing}: {reason_of(error)}.", advice_on(error)) from None


def is_transient(error: BaseException) -> bool:
    """Whether an error of storage is of the kind that passes by itself."""
    seen: BaseException | None = error
    while seen is not None:
        if (
            isinstance(seen, TimeoutError | ConnectionError)
            or (isinstance(seen, OSError) and seen.errno in _TRANSIENT_ERRNOS)
            or _status(seen) in _TRANSIENT_STATUSES
            or any(_name(kind) in _TRANSIENT_CLASSES for kind in type(seen).__mro__)
        ):
            return True
        seen = seen.__cause__  # s3fs translates, and keeps what it was told
    return False


def reason_of(error: BaseException | None) -> str:
    """What an error of storage says, on one line, without a full stop."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def advice_on(error: BaseException) -> str:
    """What to do about an error of storage that does not pass."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "Make room or give another place, and run the same command again."
    if isinstance(error, PermissionError) or "redentials" in str(error):
        return "Check who may use that place, and the credentials that are given."
    return "Check that the place exists and may be used, and run the same command again."


def _is_of_storage(error: Exception) -> bool:
    """Whether the operating system or a driver raised `error`, and not a mistake in this code."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or package not in ("builtins", "teasr", "pydantic")


def _status(error: BaseException) -> Any:
    """The HTTP status that an error carries, where each driver keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(error, "status", None) or getattr(error, "code", None)  # aiohttp, gcsfs


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _patience() -> float:
    given = os.environ.get("TEASR_STORAGE_PATIENCE", "")
    try:
        seconds = float(given or PATIENCE_SECONDS)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(
            f"TEASR_STORAGE_PATIENCE: '{given}' is no number of seconds.", "Give 0 or more."
        )
    return seconds
