"""Datasets in a bucket, on a real S3 server: the same data as in folders, also when the store fails
for a while, and one clear line when it fails for good."""

from __future__ import annotations

import http.client
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import ray
from moto.server import ThreadedMotoServer

from jobs import cli
from pipelines.ingest import ingest
from pipelines.restore import restore_many
from pipelines.runtime import ensure_ray
from pipelines.synthesize import plan, synthesize
from teasr.backbones import PRESETS, DualBranchDiT, save_model
from teasr.errors import TeasrError, UsageError
from teasr.images import encode
from teasr.restoration import RestorationSettings
from teasr.shards import Sample, read_manifest, read_shard, write_bytes, write_shard
from teasr.storage import StorageAway, StorageRefused

Fault = Callable[[str, str], str]
"""(method, path) of a request to what becomes of it: '' (goes through), 'reset', 'cut', 'hang', or
an S3 error code."""

STATUS = {"SlowDown": 503, "InternalError": 500, "AccessDenied": 403}


class Proxy(ThreadingHTTPServer):
    """Stands between s3fs and the S3 server and lets `fault` decide what goes wrong."""

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.upstream = upstream
        self.fault: Fault = through
        self.hanging = threading.Event()
        self.released = threading.Event()

    def handle_error(self, request: object, address: object) -> None:
        """Connections that end early are the point of this server."""


def through(method: str, path: str) -> str:
    return ""


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command, self.path.partition("?")[0])
        if fault == "reset":
            return self.reset()
        if fault == "hang":
            self.server.hanging.set()
            self.server.released.wait(60)
            return self.reset()
        if fault in STATUS:
            document = f"<Error><Code>{fault}</Code><Message>{fault}.</Message></Error>".encode()
            return self.send(STATUS[fault], {"Content-Type": "application/xml"}, document)
        upstream = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        response = upstream.getresponse()
        data = response.read()
        headers = {
            name: value
            for name, value in response.getheaders()
            if name.lower() not in ("content-length", "transfer-encoding", "connection")
        }
        length = response.getheader("Content-Length") or str(len(data))
        upstream.close()
        return self.send(response.status, headers, data, length, cut=fault == "cut")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815 - the library's names

    def send(
        self, status: int, headers: dict[str, str], data: bytes, length: str = "", cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.reset()

    def reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def first_times(count: int, fault: str, suffix: str = "") -> Fault:
    """The first `count` requests for every path (that ends in `suffix`) fail."""
    seen: Counter[tuple[str, str]] = Counter()
    lock = threading.Lock()

    def decide(method: str, path: str) -> str:
        with lock:
            seen[method, path] += 1
            return fault if seen[method, path] <= count and path.endswith(suffix) else ""

    return decide


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    """An S3 server behind a proxy, a Ray of two CPUs whose workers know it, and empty buckets."""
    server = ThreadedMotoServer(port=0)
    server.start()
    proxy = Proxy(server.get_host_and_port())
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # botocore's own patience would hide the faults
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "TEASR_STORAGE_PATIENCE": "1",
    }
    shared = ray.is_initialized()
    ray.shutdown()  # workers have the environment that Ray was started in
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3 = fsspec.filesystem("s3")
        s3.clear_instance_cache()
        s3 = fsspec.filesystem("s3")
        s3.mkdir("photos")
        s3.mkdir("data")
        ensure_ray(2)
        yield proxy
        ray.shutdown()
        s3.clear_instance_cache()
    proxy.shutdown()
    server.stop()
    if shared:
        ensure_ray(2)


@pytest.fixture(autouse=True)
def well(proxy: Proxy) -> Iterator[None]:
    """Every test begins and ends with a store that is well."""
    proxy.fault = through
    yield
    proxy.fault = through


@pytest.fixture(scope="module")
def album(
    proxy: Proxy, tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., np.ndarray]
) -> Path:
    """Five pictures, in a folder and at s3://photos/album."""
    folder = tmp_path_factory.mktemp("album") / "album"
    folder.mkdir()
    for i in range(5):
        data = encode(photo(97 + i, 122 + i, seed=i))
        (folder / f"p{i}.png").write_bytes(data)
        write_bytes(f"s3://photos/album/p{i}.png", data)
    return folder


@pytest.fixture(scope="module")
def calm(album: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Fingerprints of the album's datasets as folders."""
    folder = tmp_path_factory.mktemp("calm")
    hr = ingest([str(album)], str(folder / "hr"), shard_size=2)
    pairs = synthesize(str(folder / "hr"), str(folder / "pairs"), seed=7)
    return {"hr": hr.manifest.fingerprint, "pairs": pairs.manifest.fingerprint}


@pytest.fixture(scope="module")
def hr(album: Path) -> str:
    """The album as a dataset in a bucket."""
    return ingest(["s3://photos/album"], "s3://data/hr", shard_size=2).destination


def listing(folder: str) -> list[str]:
    s3 = fsspec.filesystem("s3")
    s3.invalidate_cache()
    return [name.rpartition("/")[2] for name in s3.find(folder)]


def test_a_bucket_holds_what_a_folder_would(hr: str, calm: dict[str, str]) -> None:
    assert read_manifest(hr).fingerprint == calm["hr"]
    by_glob = ingest(["s3://photos/album/*.png"], "s3://data/glob", shard_size=2)
    assert by_glob.manifest.fingerprint == calm["hr"]
    pairs = synthesize(hr, "s3://data/pairs", seed=7)
    assert pairs.manifest.fingerprint == calm["pairs"]
    assert read_manifest("s3://data/pairs", "pairs") == pairs.manifest
    keys = [s.key for i in range(3) for s in read_shard(f"s3://data/pairs/pairs-0000{i}.tar")]
    assert sorted(keys) == [f"p{i}-v0" for i in range(5)]
    for again in (
        ingest(["s3://photos/album"], hr, shard_size=2),
        synthesize(hr, "s3://data/pairs", seed=7),
    ):
        assert (again.shards, again.skipped_shards) == (0, 3)


def test_pictures_of_a_bucket_are_restored(hr: str, tmp_path: Path) -> None:
    network = DualBranchDiT(PRESETS["teasr-xs"])
    save_model(network, network.state_dict(), tmp_path / "model")
    result = restore_many(tmp_path / "model", hr, tmp_path / "out", RestorationSettings())
    assert result.done == ("p0", "p1", "p2", "p3", "p4") and not result.failed


# What s3fs itself tries again, it tries five times: of that, more is needed to reach our patience.
@pytest.mark.journey
@pytest.mark.parametrize(
    ("count", "fault", "suffix"),
    [(1, "reset", ""), (1, "InternalError", ""), (6, "SlowDown", ".tar"), (6, "cut", ".tar")],
)
def test_a_store_that_fails_for_a_while_costs_time_alone(
    calm: dict[str, str],
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    fault: str,
    suffix: str,
) -> None:
    monkeypatch.setenv("TEASR_STORAGE_PATIENCE", "60")  # a listing here is several requests
    place = f"s3://data/{fault.lower()}"
    proxy.fault = first_times(count, fault, suffix)
    made = ingest(["s3://photos/album"], f"{place}/hr", shard_size=2)
    assert made.manifest.fingerprint == calm["hr"] and made.quarantined == {}
    pairs = synthesize(f"{place}/hr", f"{place}/pairs", seed=7)
    assert pairs.manifest.fingerprint == calm["pairs"]


def test_a_store_that_fails_for_good_is_said_and_the_rerun_completes(
    hr: str, calm: dict[str, str], proxy: Proxy
) -> None:
    place = "s3://data/later"
    proxy.fault = lambda method, path: "reset" if path.endswith("pairs-00001.tar") else ""
    with pytest.raises(TeasrError, match=r"pairs-00001\.tar.*tried 3 times.*same command again"):
        synthesize(hr, place, seed=7)
    assert "manifest.json" not in listing(place) and "pairs-00001.tar" not in listing(place)
    proxy.fault = lambda method, path: "SlowDown"
    with pytest.raises(StorageAway, match=r"data/hr/manifest\.json: .*tried 3 times"):
        plan(hr, place, seed=7)
    proxy.fault = through
    rerun = synthesize(hr, place, seed=7)
    assert rerun.shards < 3 and rerun.manifest.fingerprint == calm["pairs"]


def test_a_killed_upload_leaves_nothing_visible(proxy: Proxy, tmp_path: Path) -> None:
    proxy.fault = lambda method, path: "hang" if method == "PUT" else ""
    code = (
        "from teasr.shards import Sample, write_shard; import os;"
        "write_shard('s3://data/killed/hr-00000.tar',"
        "            [Sample('a', {'png': os.urandom(100_000), 'json': b'{}'})])"
    )
    environment = {**os.environ, **source_path(), "TMPDIR": str(tmp_path)}
    writer = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        assert proxy.hanging.wait(60)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        proxy.released.set()
    proxy.fault = through
    assert listing("s3://data/killed") == []
    write_shard("s3://data/killed/hr-00000.tar", [Sample("a", {"png": b"x", "json": b"{}"})])
    assert listing("s3://data/killed") == ["hr-00000.tar"]


def source_path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_a_shard_that_is_cut_in_the_middle_is_read_once(proxy: Proxy) -> None:
    samples = [Sample(f"k{i}", {"png": os.urandom(50_000), "json": b"{}"}) for i in range(4)]
    write_shard("s3://data/cut/hr-00000.tar", samples)
    proxy.fault = first_times(6, "cut")
    assert list(read_shard("s3://data/cut/hr-00000.tar")) == samples


def test_what_is_refused_is_said_at_once(hr: str, proxy: Proxy) -> None:
    with pytest.raises(UsageError, match="s3://nowhere/hr is not a dataset"):
        read_manifest("s3://nowhere/hr")
    with pytest.raises(TeasrError, match=r"s3://nowhere/x: .*bucket does not exist"):
        write_bytes("s3://nowhere/x", b"x")
    assert "nowhere" not in fsspec.filesystem("s3").ls("", refresh=True)
    with pytest.raises(TeasrError, match=r"no shard s3://data/hr/hr-00009\.tar"):
        list(read_shard("s3://data/hr/hr-00009.tar"))
    asked: Counter[str] = Counter()

    def deny(method: str, path: str) -> str:
        asked[path] += 1
        return "AccessDenied"

    proxy.fault = deny
    with pytest.raises(StorageRefused, match=r"hr-00000\.tar: AccessDenied.*credentials"):
        list(read_shard(f"{hr}/hr-00000.tar"))
    assert asked == {"/data/hr/hr-00000.tar": 1}


@pytest.mark.parametrize(
    ("arguments", "fault", "code", "told"),
    [
        (["ingest", "s3://nowhere/album", "s3://data/x"], "", 2, "does not exist"),
        (["ingest", "s3://photos/album", "s3://nowhere/x"], "", 1, "bucket does not exist"),
        (["ingest", "s3://photos/album", "s3://data/x"], "AccessDenied", 1, "credentials"),
        (["ingest", "s3://photos/album", "s3://data/x"], "reset", 1, "same command again"),
        (["synthesize", "s3://data/hr", "s3://nowhere/x"], "", 1, "bucket does not exist"),
        (["synthesize", "s3://data/hr", "s3://data/x"], "AccessDenied", 1, "credentials"),
        (["synthesize", "s3://data/hr", "s3://data/x"], "reset", 1, "same command again"),
        (["restore", "teasr-s", "s3://data/hr", "out"], "AccessDenied", 1, "credentials"),
    ],
)
def test_the_command_line_answers_in_one_line(
    hr: str,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    fault: str,
    code: int,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    proxy.fault = lambda method, path: fault
    monkeypatch.setattr(sys, "argv", ["teasr", *arguments])
    said = io.StringIO()
    monkeypatch.setattr(cli.errors, "_file", said)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    line = said.getvalue().strip()
    assert stop.value.code == code, line
    assert told in line and "\n" not in line
