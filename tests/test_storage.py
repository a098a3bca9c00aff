"""Patience with storage: what passes is tried again, what does not is said at once."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from s3fs.errors import translate_boto_error

from teasr.errors import UsageError
from teasr.storage import StorageAway, StorageRefused, is_transient, patiently


def of_s3(code: str, status: int) -> BaseException:
    """What s3fs raises for an answer of S3."""
    response = {
        "Error": {"Code": code, "Message": f"{code}."},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return translate_boto_error(ClientError(response, "GetObject"))  # type: ignore[arg-type]


PASSES = [
    ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError(),
    OSError(errno.ESTALE, "Stale file handle"),
    EndpointConnectionError(endpoint_url="http://127.0.0.1"),
    of_s3("SlowDown", 503),
    of_s3("InternalError", 500),
    of_s3("InternalError", 200),  # told in the body of an answer that began well
    of_s3("TooManyRequests", 429),
    of_s3("502", 502),
    of_s3("RequestTimeout", 400),
]
STAYS = [
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    NoCredentialsError(),
    of_s3("AccessDenied", 403),
    of_s3("InvalidAccessKeyId", 403),
    of_s3("SignatureDoesNotMatch", 403),
    of_s3("InvalidBucketName", 400),
]


def failing(error: BaseException, times: int) -> Callable[[], int]:
    """Fails so often, then says how often it was called."""
    calls = 0

    def action() -> int:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise error
        return calls

    return action


@pytest.mark.parametrize("error", PASSES, ids=repr)
def test_what_passes_is_waited_for(error: BaseException) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", STAYS, ids=repr)
def test_what_stays_is_said_at_once(error: BaseException) -> None:
    action = failing(error, 1)
    with pytest.raises(StorageRefused, match=r"^Cannot read s3://b/x: .+\. .+"):
        patiently("read s3://b/x", action)
    assert action() == 2


@pytest.mark.parametrize("error", [FileNotFoundError("x"), of_s3("NoSuchKey", 404)], ids=repr)
def test_what_is_not_there_is_the_callers_to_say(error: BaseException) -> None:
    with pytest.raises(FileNotFoundError):
        patiently("read x", failing(error, 1))


def test_each_wait_is_told_once_and_the_result_comes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "teasr.storage"):
        assert patiently("read s3://b/x", failing(PASSES[0], 2)) == 3
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert all(line.startswith("Cannot read s3://b/x: reset. Trying again in ") for line in told)


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEASR_STORAGE_PATIENCE", "0")
    action = failing(PASSES[4], 99)
    with pytest.raises(StorageAway) as caught:
        patiently("write s3://b/x", action)
    for part in ("write s3://b/x", "SlowDown", "tried 3 times", "run the same command again"):
        assert part in str(caught.value)


@pytest.mark.parametrize("given", ["soon", "-1", "nan", "inf"])
def test_patience_is_a_number_of_seconds(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEASR_STORAGE_PATIENCE", given)
    with pytest.raises(UsageError, match="TEASR_STORAGE_PATIENCE"):
        patiently("read x", failing(PASSES[0], 1))


def test_our_own_mistakes_are_not_storages() -> None:
    with pytest.raises(ZeroDivisionError):
        patiently("read x", lambda: 1 // 0)  # type: ignore[misc]
