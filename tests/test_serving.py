"""The served model, in process and behind MLflow's real scoring server."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from teasr import promotion, registry, tracking
from teasr.backbones.dit import PRESETS, DualBranchDiT
from teasr.backbones.folder import load_model, save_model
from teasr.errors import TeasrError, UsageError
from teasr.evaluation import Evaluation
from teasr.images import decode, encode
from teasr.metrics import Scores
from teasr.restoration import RestorationSettings, restore_picture
from teasr.serving import ScoringServer, request


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    settings = PRESETS["teasr-xs"]
    network = DualBranchDiT(settings)
    for parameter in network.parameters():  # a new network adds nothing to the bicubic picture
        torch.nn.init.normal_(parameter, std=0.05)
    save_model(network, network.state_dict(), folder)
    return folder


def picture(photo: Callable[..., NDArray[np.uint8]]) -> bytes:
    return encode(photo(20, 28, seed=3))


def restored(weights: Path, data: bytes, steps: int = 1, seed: int = 0) -> bytes:
    settings = RestorationSettings(steps=steps, seed=seed)
    return restore_picture(load_model(weights).network, decode(data), settings)


def post(url: str, body: Any) -> tuple[int, dict[str, Any]]:
    """Status and answer of a raw request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    question = urllib.request.Request(
        f"{url}/invocations", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(question, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_saved_model_restores_as_the_library_does(
    weights: Path,
    tmp_path: Path,
    photo: Callable[..., NDArray[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pandas
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import load_model

    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow puts the model's code in front
    registry.save_model(weights, tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    data = picture(photo)
    table = pandas.DataFrame({"image": [base64.b64encode(data).decode()] * 2})
    for answer in model.predict(table, params={"steps": 2, "seed": 5}):
        assert base64.b64decode(answer["image"]) == restored(weights, data, steps=2, seed=5)
        assert (answer["width"], answer["height"]) == (112, 80)
        assert answer["version"] == "unregistered"
    for image, params, said in (
        ("???", {}, "not valid base64"),
        (base64.b64encode(b"GIF89a...").decode(), {}, "The file is a GIF."),
        (table["image"][0], {"steps": 0}, "'steps'"),
        (table["image"][0], {"tile": 4}, "'tile'"),
    ):
        with pytest.raises(MlflowException, match=said) as caught:
            model.predict(pandas.DataFrame({"image": [image]}), params=params)
        assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_a_taken_port_is_told_before_anything_starts(weights: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(TeasrError, match=f"Port {port} of 127.0.0.1 cannot be used"),
            ScoringServer(str(weights), port),
        ):
            pass
    with pytest.raises(UsageError, match="not a port"), ScoringServer(str(weights), 70000):
        pass
    with pytest.raises(UsageError, match="no model"), ScoringServer("/no/such/folder"):
        pass


def test_no_server_is_one_sentence() -> None:
    with pytest.raises(TeasrError, match=r"No server answers at http://127.0.0.1:1 \("):
        request("http://127.0.0.1:1", b"")


@pytest.mark.journey
def test_the_champion_is_served(
    weights: Path,
    tmp_path: Path,
    photo: Callable[..., NDArray[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    client = tracking.connect(tmp_path / "home")
    run = client.create_run(tracking.experiment_id(client, "trainings")).info.run_id
    uri = registry.log_model(client, run, weights)
    scores = {"bicubic": {"p": Scores(20, 0.5, None)}, "1 step": {"p": Scores(21, 0.5, None)}}
    registry.register(client, run, uri, "teasr", Evaluation("bench", scores), {})
    promotion.promote(client, "teasr")

    data = picture(photo)
    with ScoringServer("models:/teasr@champion", client=client) as server:
        group = server._process.pid
        answer = request(server.url, data, steps=2, seed=7)
        assert answer.version == server.version == "teasr version 1"
        assert answer.png == restored(weights, data, steps=2, seed=7)
        assert (answer.width, answer.height) == (112, 80)

        # What is wrong with a request is said in one sentence, with status 400.
        for image, steps, said in (
            (b"hello", 1, "The file is not a picture of a known format."),
            (data[:-50], 1, "cut off"),
            (data, 0, "'steps'"),
            (data, 65, "'steps'"),
        ):
            with pytest.raises(UsageError, match=said) as caught:
                request(server.url, image, steps=steps)
            assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
        for body in (
            b"not json",
            {"dataframe_split": {"columns": ["image"], "data": [["***"]]}},
            {"dataframe_split": {"columns": ["picture"], "data": [["eA=="]]}},
            {
                "dataframe_split": {"columns": ["image"], "data": [["eA=="]]},
                "params": {"steps": "x"},
            },
        ):
            status, reply = post(server.url, body)
            assert status == 400, reply
            assert "Traceback" not in json.dumps(reply)
        # After all that, it still serves.
        assert request(server.url, data).png == restored(weights, data)
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.journey
def test_a_server_that_dies_shows_its_last_words(weights: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.json").write_bytes((weights / "model.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"\0" * 64)
    start = time.monotonic()
    with (
        pytest.raises(TeasrError, match=r"did not start[\s\S]*model.safetensors is damaged"),
        ScoringServer(str(broken)),
    ):
        pass
    assert time.monotonic() - start < 150  # it does not wait for an answer: that takes 180 s
