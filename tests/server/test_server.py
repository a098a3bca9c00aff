"""One real server process: what it answers, what it refuses, and what it survives."""

from __future__ import annotations

import base64
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from teasr.backbones import load_model
from teasr.errors import UsageError
from teasr.images import decode, encode
from teasr.restoration import RestorationSettings, restore_picture
from teasr.serving import request
from tests.server.conftest import Answer, Running

pytestmark = pytest.mark.journey
Photo = Callable[..., NDArray[np.uint8]]


@pytest.fixture(scope="module")
def png(photo: Photo) -> bytes:
    return encode(photo(20, 28, seed=3))


def pixels(data: bytes) -> NDArray[np.uint8]:
    return decode(data).rgb


def alone(weights: Path, data: bytes, **chosen: int) -> NDArray[np.uint8]:
    """What the library makes of a picture."""
    network = load_model(weights).network
    return pixels(restore_picture(network, decode(data), RestorationSettings(**chosen)))


def assert_equal(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> None:
    """Equal but for a value that lies between two levels: sums may be taken in another order."""
    difference = np.abs(first.astype(int) - second)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001


def one_sentence(answer: Answer, *statuses: int) -> str:
    assert answer.status in statuses, (answer.status, answer.body[:300])
    message = answer.message
    assert message and "\n" not in message and "Traceback" not in message
    assert message.endswith((".", ")")), message
    return message


def invocation(images: list[Any], **params: Any) -> bytes:
    split = {"columns": ["image"], "data": [[image] for image in images]}
    return json.dumps({"dataframe_split": split, "params": params}).encode()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


# ---------------------------------------------------------------- answers


def test_a_picture_is_restored_as_by_the_library(
    server: Running, weights: Path, png: bytes
) -> None:
    answer = server.restore(png, "?steps=2&seed=7&tile=16")
    assert answer.status == 200 and answer.headers["content-type"] == "image/png"
    assert answer.headers["teasr-version"] == str(weights)
    for stage in ("decode", "wait", "restore", "encode"):
        assert f"{stage};dur=" in answer.headers["server-timing"]
    assert_equal(pixels(answer.body), alone(weights, png, steps=2, seed=7, tile=16))
    again = server.restore(png, "?steps=2&seed=7&tile=16")
    assert pixels(again.body).tobytes() == pixels(answer.body).tobytes()
    webp = server.restore(png, "?steps=2&seed=7&tile=16&format=webp")
    assert pixels(webp.body).tobytes() == pixels(answer.body).tobytes()
    assert server.restore(png, "?format=jpeg").body.startswith(b"\xff\xd8")


def test_alpha_and_grey_stay(server: Running, weights: Path, photo: Photo) -> None:
    rgb = photo(16, 16)
    clear = encode(rgb, alpha=rgb[..., 0])
    restored = decode(server.restore(clear).body)
    assert restored.alpha is not None and restored.alpha.shape == (64, 64)
    assert "transparency" in one_sentence(server.restore(clear, "?format=jpeg"), 400)
    assert decode(server.restore(encode(rgb, grey=True)).body).grey


def test_mlflows_protocol(server: Running, weights: Path, png: bytes) -> None:
    answer = request(server.url, png, steps=2, seed=7)
    assert answer.version == str(weights) and (answer.width, answer.height) == (112, 80)
    assert_equal(pixels(answer.png), alone(weights, png, steps=2, seed=7))
    records = {"dataframe_records": [{"image": text(png)}] * 3}
    several = server.ask("POST", "/invocations", json.dumps(records).encode())
    predictions = json.loads(several.body)["predictions"]
    assert len(predictions) == 3 and len({p["image"] for p in predictions}) == 1
    assert server.ask("GET", "/ping").status == 200
    with pytest.raises(UsageError, match="not a picture"):
        request(server.url, b"hello")


def test_it_tells_about_itself(server: Running, weights: Path, png: bytes) -> None:
    told = json.loads(server.ask("GET", "/version").body)
    assert told["version"] == told["model"] == str(weights) and told["alias"] is None
    assert told["loaded_from"] == str(weights) and told["since"].startswith("20")
    health = json.loads(server.ask("GET", "/health").body)
    assert health["ready"] and health["queue"] == 0 and health["reload_failure"] is None
    before = server.metric("teasr_pixels_total")
    server.restore(png)
    assert server.metric("teasr_pixels_total") - before == 80 * 112
    for name in (
        *("teasr_requests_total", "teasr_request_seconds_count", "teasr_batch_tiles_count"),
        *("teasr_served", "process_resident_memory_bytes"),
    ):
        assert server.metric(name) > 0, name
    page = server.ask("GET", "/")
    assert page.status == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    paths = json.loads(server.ask("GET", "/openapi.json").body)["paths"]
    assert {"/restore", "/invocations", "/version", "/health", "/metrics", "/"} == set(paths)


# ---------------------------------------------------------------- refusals


def _encoded(array: NDArray[Any], kind: str, **options: Any) -> bytes:
    file = BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def _huge(width: int, height: int) -> bytes:
    """A PNG whose header says so and whose pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")[:4])


def test_bad_pictures_are_refused_in_one_sentence(
    server: Running, png: bytes, photo: Photo
) -> None:
    frames = [Image.fromarray(photo(16, 16, seed=i)) for i in range(2)]
    animation = BytesIO()
    frames[0].save(animation, "WEBP", save_all=True, append_images=frames[1:])
    cmyk = BytesIO()
    frames[0].convert("CMYK").save(cmyk, "JPEG")
    for data, status, said in (
        (b"hello", 400, "not a picture"),
        (png[:-60], 400, "cut off"),
        (_huge(30_000, 30_000), 413, "900,000,000 pixels"),
        (encode(photo(200, 101)), 413, "20,200 pixels"),
        (animation.getvalue(), 400, "several pictures"),
        (cmyk.getvalue(), 400, "CMYK"),
        (b"GIF89a" + bytes(20), 400, "GIF"),
        (b"", 400, "no body"),
    ):
        assert said in one_sentence(server.restore(data), status)
        if data:
            body = invocation([text(data)])
            assert said in one_sentence(server.ask("POST", "/invocations", body), status)


def test_odd_pictures_are_restored(server: Running, photo: Photo) -> None:
    assert pixels(server.restore(encode(photo(1, 1))).body).shape == (4, 4, 3)
    wide = (photo(12, 12)[..., 0].astype(np.uint16) << 8) + 7
    assert decode(server.restore(_encoded(wide, "PNG")).body).grey


def test_bad_requests_are_refused_in_one_sentence(server: Running, png: bytes) -> None:
    for query, said in (
        ("?steps=0", "'steps'"),
        ("?steps=1000000000", "'steps'"),
        ("?steps=many", "'steps'"),
        ("?seed=-1", "'seed'"),
        ("?seed=" + "9" * 5000, "'seed'"),
        ("?tile=4", "'tile'"),
        ("?tile=100000", "'tile'"),
        ("?format=gif", "'format'"),
        ("?stepps=1", "'stepps' is not known"),
    ):
        message = one_sentence(server.restore(png, query), 400)
        assert said in message and len(message) < 250
    good = text(png)
    for body, said in (
        (b"not json", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "The body"),
        (b"{}", "dataframe_split"),
        (invocation(["***"]), "base64"),
        (invocation([5]), "base64"),
        (invocation([]), "no picture"),
        (invocation([good], steps=0), "steps"),
        (invocation([good], steps=10**9), "steps"),
        (invocation([good], steps=1.5), "steps"),
        (invocation([good], colour="wavelet"), "colour"),
        (b'{"dataframe_split": {"columns": ["picture"], "data": [["eA=="]]}}', "no column"),
        (b'{"dataframe_split": {"columns": ["image"], "data": [[]]}}', "as many values"),
        (b'{"dataframe_records": [{"picture": "eA=="}]}', "image"),
    ):
        assert said in one_sentence(server.ask("POST", "/invocations", body), 400)
    assert (
        "a form"
        in one_sentence(
            server.ask("POST", "/restore", b"--x", {"Content-Type": "multipart/form-data"}), 415
        ).lower()
    )
    one_sentence(server.ask("GET", "/nothing"), 404)
    one_sentence(server.ask("DELETE", "/restore"), 405)


def test_a_large_body_is_refused(server: Running, png: bytes) -> None:
    assert "1 MiB" in one_sentence(server.restore(bytes(3 << 19)), 413)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            b"POST /restore HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in connection.recv(4096)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000)
        assert b" 400 " in connection.recv(4096)
    assert server.restore(png).status == 200


def test_the_queue_is_bounded_and_a_client_that_leaves_is_forgotten(
    server: Running, png: bytes, photo: Photo
) -> None:
    work = encode(photo(140, 140))
    header = b"POST /restore?steps=64&tile=32 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    waiting = []
    for _ in range(8):
        waiting.append(socket.create_connection(("127.0.0.1", server.port)))
        waiting[-1].sendall(header % len(work) + work)
    deadline = time.monotonic() + 30
    while json.loads(server.ask("GET", "/health").body)["queue"] < 8:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    full = server.restore(png)
    assert "The queue of 8 pictures is full" in one_sentence(full, 429)
    assert int(full.headers["retry-after"]) >= 1
    batch = server.ask("POST", "/invocations", invocation([text(png)] * 9))
    one_sentence(batch, 429)
    for connection in waiting:
        connection.close()
    while json.loads(server.ask("GET", "/health").body)["queue"] > 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server.restore(png).status == 200
    text_ = server.ask("GET", "/metrics").body.decode()
    assert 'teasr_requests_total{path="/restore",status="499"} 8.0' in text_


def test_a_request_that_takes_too_long_is_refused(server: Running, photo: Photo) -> None:
    answer = server.restore(encode(photo(140, 140)), "?steps=64&tile=8")
    assert "took longer than the 20 s" in one_sentence(answer, 413)


# ---------------------------------------------------------------- fuzzing


def _value(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values in and out of what a parameter's schema allows."""
    texts = st.text(max_size=20)
    numbers = st.one_of(st.integers(-2, 70), st.integers(), st.floats(), st.just(10**9))
    allowed = st.sampled_from(schema["enum"]) if "enum" in schema else st.integers(1, 4)
    return st.one_of(allowed, numbers, texts)


def _bodies(png: bytes) -> st.SearchStrategy[bytes]:
    @st.composite
    def damaged(draw: st.DrawFn) -> bytes:
        data = bytearray(png)
        for place in draw(st.lists(st.integers(0, len(png) - 1), max_size=4)):
            data[place] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.integers(0, len(png)))])

    magic = st.sampled_from(
        [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF0000WEBPVP8X", b"II*\0", b"BM"]
    )
    return st.one_of(
        st.just(png),
        damaged(),
        st.binary(max_size=200),
        st.builds(bytes.__add__, magic, st.binary(max_size=100)),
    )


def _documents(png: bytes, properties: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """JSON from the schema's own names, right and wrong values below them."""
    leaves = st.one_of(
        st.none(), st.booleans(), st.integers(), st.text(max_size=10), st.just(text(png)),
        st.builds(text, _bodies(png)), st.just("image"),
    )  # fmt: skip
    names = st.sampled_from([*properties, "image", "columns", "data", "steps", "seed", "tile"])
    anything = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)
        ),
        max_leaves=8,
    )
    near = st.fixed_dictionaries(
        {"dataframe_split": st.fixed_dictionaries({
            "columns": st.one_of(st.just(["image"]), anything),
            "data": st.one_of(
                st.lists(st.lists(leaves, min_size=1, max_size=1), max_size=2), anything
            ),
        })},
        optional={"params": st.one_of(st.just({"steps": 2}), anything)},
    )  # fmt: skip
    dumped = st.one_of(near, anything).map(lambda value: json.dumps(value).encode())
    return st.one_of(
        dumped, dumped.map(lambda data: data[: len(data) // 2]), st.binary(max_size=60)
    )


def test_500_fuzzed_requests(server: Running, png: bytes, weights: Path) -> None:
    """From the server's own description: each is answered by a 200 or a sentence."""
    description = json.loads(server.ask("GET", "/openapi.json").body)
    operations = [(path, method) for path, item in description["paths"].items() for method in item]
    assert len(operations) >= 6
    restore = description["paths"]["/restore"]["post"]
    parameters = {p["name"]: p["schema"] for p in restore["parameters"]}
    content = description["paths"]["/invocations"]["post"]["requestBody"]["content"]
    properties = content["application/json"]["schema"]["properties"]
    queries = st.fixed_dictionaries(
        {}, optional={name: _value(schema) for name, schema in parameters.items()}
    )
    bodies, documents = _bodies(png), _documents(png, properties)
    for _ in range(20):
        server.restore(png)
    before, asked, statuses = server.metric("process_resident_memory_bytes"), 0, set()

    @settings(
        max_examples=500, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        nonlocal asked
        path, method = data.draw(
            st.sampled_from(
                [*operations, *[("/restore", "post")] * 6, *[("/invocations", "post")] * 6]
            )
        )
        query = data.draw(queries) if path == "/restore" else {}
        body = (
            data.draw(documents if path == "/invocations" else bodies) if method == "post" else None
        )
        target = f"{path}?{urlencode(query, errors='replace')}" if query else path
        answer = server.ask(method.upper(), target, body)
        asked += 1
        statuses.add(answer.status)
        if answer.status != 200:
            one_sentence(answer, *range(400, 500))

    fuzz()
    assert asked >= 500 and {200, 400} <= statuses
    assert server.metric("process_resident_memory_bytes") - before < 40e6
    assert_equal(pixels(server.restore(png).body), alone(weights, png))
    assert server.process.poll() is None and "Traceback" not in server.log.read_text()


def test_many_clients_at_once_get_their_own_pictures(
    server: Running, weights: Path, photo: Photo
) -> None:
    pictures = [encode(photo(24, 32, seed=i)) for i in range(6)]
    expected = [alone(weights, data, seed=i) for i, data in enumerate(pictures)]

    def ask(i: int) -> tuple[int, bytes]:
        return i, server.restore(pictures[i % 6], f"?seed={i % 6}").body

    with ThreadPoolExecutor(6) as pool:
        for i, body in pool.map(ask, range(30)):
            assert_equal(pixels(body), expected[i % 6])
