"""DeepSpeed through `Engine` against plain torch. Each case runs in one spawned process, where
DeepSpeed may set up `torch.distributed` without touching the other tests."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from teasr.backbones.dit import PRESETS, DualBranchDiT
from teasr.engine import Engine, EngineSettings, free_extensions
from teasr.errors import TeasrError
from tests.ports import free_port

STEPS = 4
PLAIN = {
    "precision": "fp32",
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "warmup_share": 0.5,
}


SPAWN = multiprocessing.get_context("spawn")


def _join(port: int, rank: int = 0, workers: int = 1) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable[..., Any]]:
    """`apart(function, *arguments)` in a process of its own that stands for a training worker."""
    with ProcessPoolExecutor(1, SPAWN, initializer=_join, initargs=(free_port(),)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


# ------------------------------------------------------------------- what runs in the other process


def network(seed: int = 0) -> DualBranchDiT:
    torch.manual_seed(seed)
    made = DualBranchDiT(PRESETS["teasr-xs"])
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return made


def loss_of(velocity: Any, step: int) -> Tensor:
    """Two forward passes before one backward, as the objective has them."""
    generator = torch.Generator().manual_seed(step)
    condition = torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1
    x_t, target = torch.randn(2, 2, 3, 16, 16, generator=generator)
    t = 0.2 + 0.8 * torch.rand(2, generator=generator)
    with torch.no_grad():
        still = velocity(x_t, t, t, condition)
    first = velocity(x_t, t, 0 * t, condition)
    second = velocity(x_t, -t, -t, condition)
    return (first - target).square().mean() + 0.1 * (second - still).square().mean()


def made_engine(settings: dict[str, Any], seed: int = 0) -> Engine:
    return Engine(network(seed), EngineSettings.model_validate(PLAIN | settings), micro_batch=2)


def advance(engine: Engine, start: int, count: int) -> list[tuple[float, float | None]]:
    results = []
    for step in range(start, start + count):
        loss = loss_of(engine.network, step)
        norm = engine.step(loss, step / 10)
        results.append((float(loss.detach()), norm))
    return results


def run_engine(settings: dict[str, Any], count: int = STEPS) -> dict[str, Any]:
    engine = made_engine(settings)
    history = advance(engine, 0, count)
    with torch.no_grad():
        with engine.averaged():  # before any state_dict: nothing has gathered the weights afresh
            averaged_loss = float(loss_of(engine.network, 99))
        restored_loss = float(loss_of(engine.network, 99))
    weights = engine.state_dict(average=False)
    average = engine.state_dict()
    return {
        "losses": [loss for loss, _ in history],
        "norms": [norm for _, norm in history],
        "weights": weights,
        "average": average,
        "averaged_loss": averaged_loss,
        "restored": engine.state_dict(average=False),
        "restored_loss": restored_loss,
        "steps": engine.steps,
        "next": advance(engine, count, 1)[0][0],
    }


def run_plain(settings: dict[str, Any], count: int = STEPS) -> dict[str, Any]:
    """The same by hand: torch's AdamW, clipping, accumulation and the average's recurrence."""
    chosen = EngineSettings.model_validate(PLAIN | settings)
    made = network()
    optimizer = torch.optim.AdamW(
        made.parameters(), chosen.learning_rate, chosen.betas, weight_decay=chosen.weight_decay
    )
    average = {name: value.clone() for name, value in made.state_dict().items()}
    result: dict[str, Any] = {"losses": [], "norms": [], "steps": 0}
    for step in range(count + chosen.gradient_accumulation):
        loss = loss_of(made, step)
        (loss / chosen.gradient_accumulation).backward()
        for parameter in made.parameters():  # torch leaves out what has no gradient, ZeRO does not
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if step >= count:
            result.setdefault("next", float(loss.detach()))
            continue
        result["losses"].append(float(loss.detach()))
        if (step + 1) % chosen.gradient_accumulation:
            result["norms"].append(None)
            continue
        limit = chosen.gradient_clipping or math.inf
        norm = torch.nn.utils.clip_grad_norm_(made.parameters(), limit)
        result["norms"].append(float(norm))
        for group in optimizer.param_groups:
            group["lr"] = chosen.learning_rate_at(step / 10)
        optimizer.step()
        optimizer.zero_grad()
        result["steps"] += 1
        decay = min(chosen.ema_decay, (1 + result["steps"]) / (10 + result["steps"]))
        for name, value in made.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
        result["weights"] = {name: value.clone() for name, value in made.state_dict().items()}
    result["average"] = average if chosen.ema_decay > 0 else result["weights"]
    with torch.no_grad():
        result["restored_loss"] = float(loss_of(made, 99))
        made.load_state_dict(result["average"])
        result["averaged_loss"] = float(loss_of(made, 99))
    return result


def _worker(port: int, rank: int, settings: dict[str, Any], folder: str) -> None:
    _join(port, rank, workers=2)
    torch.save(run_engine(settings), Path(folder) / f"{rank}.pt")
    from deepspeed.comm.comm import cdb

    assert cdb is not None and cdb.shm_comm_op is None  # its kernel was not compiled


def resume(folder: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(straight through, stopped in the middle and taken up by an engine of other weights)."""
    results = []
    for stop in (False, True):
        engine = made_engine(settings)
        history = advance(engine, 0, 3)
        state: dict[str, Any] = {}
        if stop:
            path = Path(folder)
            engine.save(path, {"steps": engine.steps, "position": {"samples": 6}})
            advance(engine, 3, 1)  # what happens after the checkpoint must not matter
            engine = made_engine(settings, seed=1)
            state = engine.load(path)
        history += advance(engine, 3, 3)
        results.append(
            {
                "history": history,
                "steps": engine.steps,
                "weights": engine.state_dict(average=False),
                "average": engine.state_dict(),
                "state": state,
            }
        )
    return results[0], results[1]


def checkpoint_early(folder: str) -> list[float | None]:
    """Norms of steps of a single pass, with the weights asked for after each, of an engine that
    begins with a checkpoint."""
    made_engine({"zero_stage": 3}).save(Path(folder), {})
    engine, norms = made_engine({"zero_stage": 3}), []
    engine.load(Path(folder))
    for _ in range(3):
        x_t, condition = torch.full((1, 3, 16, 16), 0.5), torch.zeros(1, 3, 4, 4)
        loss = engine.network(x_t, torch.ones(1), torch.zeros(1), condition).square().mean()
        norms.append(engine.step(loss, 0.5))
        engine.state_dict(average=False)
    return norms


def load_from(folder: str) -> None:
    made_engine({}).load(Path(folder))


def run_bfloat16(stage: int) -> dict[str, Any]:
    """Losses in bfloat16, and what the network makes of times that bfloat16 cannot tell apart."""
    engine = made_engine({"precision": "bf16", "zero_stage": stage})
    condition, x_t = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 16, 16)
    outputs = [
        engine.network(x_t, torch.tensor([t]), torch.tensor([t]), condition).detach()
        for t in (0.8013, 0.8017)
    ]
    history = advance(engine, 0, STEPS)
    dtypes = {parameter.dtype for parameter in engine.network.module.parameters()}
    return {"losses": [h[0] for h in history], "outputs": outputs, "dtypes": dtypes}


# ------------------------------------------------------------------------------------------- tests


def assert_same(found: dict[str, Any], plain: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert [n is None for n in found["norms"]] == [n is None for n in plain["norms"]]
    norms = [n for n in found["norms"] if n is not None]
    assert norms == pytest.approx([n for n in plain["norms"] if n is not None], rel=1e-3)
    assert found["steps"] == plain["steps"]
    assert_close(found["weights"], plain["weights"])
    assert_close(found["average"], plain["average"])
    assert found["averaged_loss"] == pytest.approx(plain["averaged_loss"], rel=3e-6)
    # Looking at the average leaves no trace, in the weights nor in the steps that follow.
    assert found["restored_loss"] == pytest.approx(plain["restored_loss"], rel=3e-6)
    for name, value in found["weights"].items():
        assert torch.equal(found["restored"][name], value)
    assert found["next"] == pytest.approx(plain["next"], rel=1e-4)


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 2, "ema_decay": 0.0},
        {"zero_stage": 3},
        {"zero_stage": 1, "gradient_clipping": 0.0, "ema_decay": 0.3},
        {"zero_stage": 1, "gradient_clipping": 0.01, "betas": (0.5, 0.7)},
        {"zero_stage": 3, "gradient_clipping": 0.01, "ema_decay": 0.3},
        {"zero_stage": 1, "gradient_accumulation": 2},
        {"zero_stage": 3, "gradient_accumulation": 2},
    ],
    ids=str,
)
def test_engine_trains_as_plain_torch_does(apart, settings: dict[str, Any]) -> None:
    found = apart(run_engine, settings)
    plain = run_plain(settings)
    assert_same(found, plain)


@pytest.mark.journey
def test_two_workers_under_zero_3_train_as_one_does(tmp_path: Path) -> None:
    """Small parameters stay gathered there, and must follow the average into and out of use."""
    port = free_port()
    settings = {"zero_stage": 3}
    workers = [
        SPAWN.Process(target=_worker, args=(port, rank, settings, str(tmp_path))) for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(400)
        assert worker.exitcode == 0
    plain = run_plain(settings)
    for rank in (0, 1):
        assert_same(torch.load(tmp_path / f"{rank}.pt", weights_only=True), plain)


def test_these_settings_matter() -> None:
    """Guards the comparison above: each setting moves the plain run by more than its tolerance."""
    base = run_plain({"zero_stage": 1})
    for change in (
        {"gradient_clipping": 0.01, "betas": (0.5, 0.7)},
        {"gradient_accumulation": 2},
        {"weight_decay": 0.0},
        {"learning_rate": 2e-3},
        {"warmup_share": 0.1},
    ):
        other = run_plain(change)
        far = max(
            float((other["weights"][n] - base["weights"][n]).abs().max()) for n in base["weights"]
        )
        assert far > 1e-4, change
    assert base["averaged_loss"] != pytest.approx(base["restored_loss"], rel=1e-3)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_run_continues_digit_for_digit(apart, tmp_path: Path, stage: int) -> None:
    straight, resumed = apart(resume, str(tmp_path), {"zero_stage": stage})
    assert resumed["state"] == {"steps": 3, "position": {"samples": 6}}
    assert resumed["history"] == straight["history"]
    assert resumed["steps"] == straight["steps"] == 6
    for kind in ("weights", "average"):
        for name, value in straight[kind].items():
            assert torch.equal(resumed[kind][name], value), (kind, name)


def test_weights_may_be_asked_for_right_after_a_resume(apart, tmp_path: Path) -> None:
    """DeepSpeed takes the order of the first pass for that of all, and loses count."""
    assert all(norm is not None and norm > 0 for norm in apart(checkpoint_early, str(tmp_path)))


def test_a_folder_without_a_checkpoint_is_named(apart, tmp_path: Path) -> None:
    with pytest.raises(TeasrError, match="holds no checkpoint"):
        apart(load_from, str(tmp_path))


@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_keeps_times_in_float32(apart, stage: int) -> None:
    found = apart(run_bfloat16, stage)
    assert found["dtypes"] == {torch.bfloat16}
    assert not torch.equal(*found["outputs"])
    exact = run_plain({})["losses"]
    assert found["losses"] == pytest.approx(exact, rel=0.05)


def test_learning_rate_rises_linearly_then_follows_a_cosine() -> None:
    settings = EngineSettings(learning_rate=2.0, warmup_share=0.2, final_learning_rate_share=0.1)
    expected = {
        0.0: 0.02,  # never zero: the first step counts
        0.05: 0.5,
        0.1: 1.0,
        0.2: 2.0,
        0.6: 0.2 + 1.8 * 0.5,
        0.4: 0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 4)),
        1.0: 0.2,
        1.5: 0.2,
    }
    for progress, rate in expected.items():
        assert settings.learning_rate_at(progress) == pytest.approx(rate), progress
    flat = EngineSettings(learning_rate=2.0, warmup_share=0.0, final_learning_rate_share=1.0)
    assert [flat.learning_rate_at(p) for p in (0.0, 0.5, 1.0)] == [2.0, 2.0, 2.0]


def test_deepspeed_is_told_every_setting() -> None:
    settings = EngineSettings(
        zero_stage=2,
        offload_optimizer=True,
        precision="bf16",
        learning_rate=0.25,
        betas=(0.5, 0.75),
        weight_decay=0.125,
        gradient_clipping=0.0,
        gradient_accumulation=3,
    )
    config = settings.deepspeed_config(7)
    assert config["train_micro_batch_size_per_gpu"] == 7
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.0
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    parameters = config["optimizer"]["params"]
    assert parameters["lr"] == 0.25 and parameters["betas"] == [0.5, 0.75]
    assert parameters["weight_decay"] == 0.125
    assert EngineSettings(precision="fp32").deepspeed_config(1)["bf16"] == {"enabled": False}


def test_offload_without_sharding_is_refused() -> None:
    with pytest.raises(ValidationError, match="offload_optimizer needs zero_stage"):
        EngineSettings(zero_stage=0, offload_optimizer=True)


def test_a_lock_of_a_killed_process_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would wait for it for ever."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    left, held = tmp_path / "left" / "lock", tmp_path / "py311_cpu" / "held" / "lock"
    for lock in (left, held):
        lock.parent.mkdir(parents=True)
    program = "import sys; f = open(sys.argv[1], 'x'); print(1, flush=True); sys.stdin.read()"
    for lock, end in ((left, True), (held, False)):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(lock)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stdout.readline()
        if end:
            process.kill()
            process.wait()
    free_extensions(patience=0.2)
    assert not left.exists() and held.exists()
    process.kill()
    process.wait()
    free_extensions(patience=0.2)
    assert not held.exists()
