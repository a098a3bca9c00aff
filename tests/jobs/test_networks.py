"""Pretrained backbones in recipes: every engine trains them and goes on exactly, and what is wrong
is told before anything starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.networks import Trainee, absolute_source, build, check_network
from jobs.recipe import Recipe, load_recipe
from teasr.backbones import DualBranchDiT, PretrainedSettings, load_model, save_model
from teasr.backbones.pretrained import PROMPT_FILE
from teasr.errors import TeasrError, UsageError
from teasr.images import encode
from teasr.objective import Objective
from teasr.shards import Manifest, Sample, write_manifest, write_shard
from tests.backbones.latents import base_folder
from tests.jobs.commands import teasr
from tests.ports import free_port
from tests.test_engine import SPAWN, _join

Run = Callable[..., tuple[int, str, str]]

LARGE = ("z-image-6b-1gpu", "qwen-image-20b-1gpu", "qwen-image-20b-8gpu")
SMALL = [
    *("training.gpu=false", "training.workers=1", "training.batch=1", "feed.crop=32"),
    *("training.steps=1", "training.log_every=1", "training.threads=1"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusers folder of each kind, stored in bfloat16 as the published ones are."""
    root = tmp_path_factory.mktemp("bases")
    return {
        kind: base_folder(kind, root / kind, torch.bfloat16) for kind in ("qwen-image", "z-image")
    }


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable[..., Any]]:
    """`apart(function, recipe, *arguments)` in another process, which stands for a training worker.

    Recipes with ZeRO-3 have a process of their own: DeepSpeed replaces `torch.nn.functional.linear`
    there for good, by one that knows no 8 bits.
    """
    pools: dict[bool, ProcessPoolExecutor] = {}

    def call(function: Callable[..., Any], recipe: Recipe, *arguments: Any) -> Any:
        sharded = recipe.engine.zero_stage == 3
        if sharded not in pools:
            given: dict[str, Any] = {"initializer": _join, "initargs": (free_port(),)}
            pools[sharded] = ProcessPoolExecutor(1, SPAWN, **given)
        return pools[sharded].submit(function, recipe, *arguments).result(timeout=300)

    yield call
    for pool in pools.values():
        pool.shutdown()


def of_base(folder: Path) -> list[str]:
    return [f"backbone.source={folder}", "backbone.revision=null", "backbone.rank=4"]


def on(base: Path, kind: str, *overrides: str) -> Recipe:
    """A recipe of a pretrained backbone."""
    backbone = f"backbone={{kind: {kind}, source: {base}, rank: 4}}"
    given = [backbone, "init=scratch", "training.minutes=null", *SMALL, *overrides]
    return load_recipe("quickstart", given)


def copied(base: Path, target: Path) -> Path:
    return Path(shutil.copytree(base, target))


# --------------------------------------------------------------------------- what is trained


def one_step(trainee: Trainee, recipe: Recipe, seed: int) -> list[float]:
    """The loss and the norm of the gradient of one step, as the training loop takes it."""
    generator = torch.Generator().manual_seed(seed)
    hr = torch.rand(2, 3, recipe.feed.crop, recipe.feed.crop, generator=generator) * 2 - 1
    lr = torch.nn.functional.interpolate(hr, scale_factor=0.25, mode="area")
    codec, engine = trainee.codec, trainee.engine
    objective = Objective(recipe.objective, None, codec.decode)
    target = engine.averaged_network if recipe.engine.ema_decay > 0 else None
    losses = objective(
        engine.network,
        codec.encode(hr),
        codec.condition(lr),
        generator,
        pictures=hr,
        target_network=target,
    )
    assert losses.is_finite() and {"rectification", "self_adversarial"} <= losses.terms.keys()
    norm = engine.step(losses.total, 0.5)
    return [float(losses.total.detach()), -1.0 if norm is None else norm]


def steps_and_resume(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, one more, and the same one again from the checkpoint in another
    engine; then what a run leaves."""
    trainee = build(recipe, None)
    start = trainee.engine.state_dict(average=False)
    for seed in range(2):
        one_step(trainee, recipe, seed)
    trainee.engine.save(folder, {"samples": 4})
    straight = one_step(trainee, recipe, 2)
    end = trainee.engine.state_dict(average=False)
    resumed = build(recipe, None)
    state = resumed.engine.load(folder)
    again = one_step(resumed, recipe, 2)
    save_model(trainee.network, trainee.engine.state_dict(), folder / "model")
    same = [torch.equal(end[n], v) for n, v in resumed.engine.state_dict(average=False).items()]
    moved = sum(not torch.equal(start[name], value) for name, value in end.items())
    return {
        "engine": type(trainee.engine).__name__,
        "straight": straight,
        "again": again,
        "state": state,
        "same": all(same),
        "moved": moved,
        "trained": len(end),
    }


CPU_OFFLOAD = [
    *("engine.zero_stage=3", "engine.offload_parameters=cpu", "engine.offload_optimizer=cpu"),
    "engine.gradient_checkpointing=true",
]
STREAM = [
    *("engine.zero_stage=0", "engine.offload_parameters=stream", "engine.offload_optimizer=cpu"),
    "engine.gradient_checkpointing=true",
]


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("z-image", []),
        ("qwen-image", CPU_OFFLOAD),
        ("z-image", STREAM),
        ("qwen-image", ["backbone.frozen_bits=8", "engine.gradient_checkpointing=true"]),
    ],
    ids=["zero-1", "zero-3-cpu", "stream", "8-bits"],
)
def test_every_engine_trains_and_goes_on_digit_for_digit(
    kind: str,
    overrides: list[str],
    bases: dict[str, Path],
    apart: Callable[..., Any],
    tmp_path: Path,
) -> None:
    if "backbone.frozen_bits=8" in overrides:
        pytest.importorskip("torchao")
    recipe = on(bases[kind], kind, "engine.precision=bf16", *overrides)
    found = apart(steps_and_resume, recipe, tmp_path / "checkpoint")
    assert found["engine"] == ("StreamedEngine" if overrides is STREAM else "Engine")
    assert found["again"] == found["straight"] and found["same"]
    assert found["state"] == {"samples": 4}
    assert found["moved"] > found["trained"] / 2  # LoRA's A moves once its B has
    assert load_model(tmp_path / "checkpoint" / "model").network.scale == 4


def first_losses(recipe: Recipe) -> list[float]:
    return one_step(build(recipe, None), recipe, 0)


def test_engines_agree_on_the_first_step(bases: dict[str, Path], apart: Callable[..., Any]) -> None:
    found = [
        apart(first_losses, on(bases["z-image"], "z-image", "engine.precision=bf16", *overrides))
        for overrides in ([], STREAM, CPU_OFFLOAD)
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=5e-3)  # bfloat16; ZeRO-3 has its own linear


def start_of(recipe: Recipe, init: Path) -> dict[str, Tensor]:
    return build(recipe, init).engine.state_dict(average=False)


def test_a_run_starts_from_the_adapters_of_a_model(
    bases: dict[str, Path], apart: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = on(bases["z-image"], "z-image", "engine.precision=bf16")
    model = apart(trained_model, recipe, tmp_path / "model")
    check_network(recipe, tmp_path / "model")
    for name, value in apart(start_of, recipe, tmp_path / "model").items():
        assert torch.equal(value, model[name].bfloat16().float()), name

    other = on(bases["z-image"], "z-image", "backbone.rank=8")
    with pytest.raises(
        UsageError, match=r"rank 4 and alpha 4; the recipe's rank 8.*backbone\.rank"
    ):
        check_network(other, tmp_path / "model")
    with pytest.raises(UsageError, match="is a z-image, and the recipe's backbone a qwen-image"):
        check_network(on(bases["qwen-image"], "qwen-image"), tmp_path / "model")
    with pytest.raises(UsageError, match="was trained on a z-image"):
        check_network(load_recipe("quickstart"), tmp_path / "model")
    moved = copied(bases["z-image"], tmp_path / "moved")
    path = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(TeasrError, match="was trained on other weights"):
        check_network(on(moved, "z-image"), tmp_path / "model")


def trained_model(recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    trainee = build(recipe, None)
    one_step(trainee, recipe, 0)
    weights = trainee.engine.state_dict()
    save_model(trainee.network, weights, folder)
    return weights


# --------------------------------------------------------------------------- shipped recipes


@pytest.mark.parametrize("name", [*LARGE, "teasr-b-gpu"])
def test_a_shipped_recipe_takes_a_step(
    name: str, bases: dict[str, Path], apart: Callable[..., Any]
) -> None:
    pytest.importorskip("torchao")
    published = load_recipe(name)
    base = published.backbone
    if isinstance(base, PretrainedSettings):
        changes = of_base(bases[base.kind])
        assert base.rank == 128 and published.feed.crop == 512
        assert published.engine.learning_rate == (5e-5 if base.kind == "z-image" else 1e-4)
        assert published.engine.weight_decay == 0 and published.engine.gradient_checkpointing
        assert published.engine.precision == "bf16" and published.training.gpu
        assert base.revision and len(base.revision) == 40
    else:
        changes = ["backbone=teasr-xs", "training.minutes=null"]
    recipe = load_recipe(name, [*changes, *SMALL])
    check_network(recipe, None)
    loss, _ = apart(first_losses, recipe)
    assert loss > 0


# --------------------------------------------------------------------------- what is wrong


def spoil_nothing(base: Path) -> None:
    pass


def without_a_shard(base: Path) -> None:
    (base / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def cut_off(base: Path) -> None:
    path = base / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_the_prompt(base: Path) -> None:
    (base / PROMPT_FILE).unlink()


def of_another_shape(base: Path) -> None:
    path = base / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_layers": 3}))


@pytest.mark.parametrize(
    ("spoil", "overrides", "told"),
    [
        (without_a_shard, [], "lacks weights"),
        (cut_off, [], "is cut off"),
        (of_another_shape, [], "describes another network"),
        (without_the_prompt, [], "neither empty_prompt.safetensors nor text_encoder/"),
        (spoil_nothing, ["backbone.kind=qwen-image"], "holds a ZImageTransformer2DModel"),
        (spoil_nothing, ["backbone.revision=" + "a" * 40], "is a folder; it has no revision"),
        (spoil_nothing, ["backbone.source=owner/name"], "it has no revision, which may mean other"),
        (spoil_nothing, ["backbone.source=/nowhere/at/all"], "There is no folder /nowhere/at/all"),
        (
            spoil_nothing,
            [*STREAM, "engine.precision=fp32"],
            "is stored in bfloat16; weights that are streamed",
        ),
    ],
)
def test_a_wrong_base_is_told_from_headers(
    spoil: Callable[[Path], None],
    overrides: list[str],
    told: str,
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = copied(bases["z-image"], tmp_path / "base")
    spoil(base)
    with pytest.raises(TeasrError) as error:
        check_network(on(base, "z-image", *overrides), None)
    assert told in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_a_crop_must_divide_into_tokens(bases: dict[str, Path], tmp_path: Path) -> None:
    base = copied(bases["z-image"], tmp_path / "base")
    path = base / "vae" / "config.json"
    described = json.loads(path.read_text())
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        described[name] = [described[name][0], *described[name]]
    path.write_text(json.dumps(described))  # halves once more
    with pytest.raises(UsageError, match=r"feed\.crop is 48.*spans 32 pixels.*multiple of 32"):
        check_network(on(base, "z-image", "feed.crop=48"), None)
    check_network(on(base, "z-image", "feed.crop=64"), None)


def test_the_folder_of_a_base_is_found_from_anywhere(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(bases["z-image"], tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    found = absolute_source(on(Path("base"), "z-image")).backbone
    assert isinstance(found, PretrainedSettings) and found.source == str(tmp_path / "base")
    published = load_recipe(LARGE[0])
    assert absolute_source(published) == published


def test_a_start_of_another_shape_is_told(untrained: Path, tmp_path: Path) -> None:
    check_network(load_recipe("quickstart", ["backbone=teasr-xs"]), untrained)
    with pytest.raises(TeasrError, match="of another shape than the recipe's backbone"):
        check_network(load_recipe("quickstart"), untrained)
    assert isinstance(load_model(untrained).network, DualBranchDiT)


# --------------------------------------------------------------------------- the whole way


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., np.ndarray]) -> Path:
    folder = tmp_path_factory.mktemp("hr")
    samples = [
        Sample(f"p{i}", {"png": encode(photo(80, 90, seed=i)), "json": b"{}"}) for i in range(4)
    ]
    info = write_shard(str(folder / "hr-000000.tar"), samples)
    write_manifest(str(folder), Manifest(kind="hr", shards=(info,)))
    return folder


@pytest.mark.journey
def test_a_corrected_command_runs_and_a_longer_one_goes_on(
    bases: dict[str, Path], data: Path, tmp_path: Path, run: Run
) -> None:
    """Streamed, through the command line: a mistake, the run, one step more."""
    base = copied(bases["qwen-image"], tmp_path / "base")
    lost = base / "transformer" / "diffusion_pytorch_model.safetensors"
    lost.rename(tmp_path / "kept")
    command = ["distill", "qwen-image-20b-1gpu", f"data={data}", *of_base(Path("base")), *SMALL]
    command += ["training.previews=1", "feed.crops_per_photo=2", "training.preview_minutes=0"]
    code, _, told = run(*command)
    assert code == 2 and "lacks weights" in told and not (tmp_path / "home" / "runs").exists()
    (tmp_path / "kept").rename(lost)

    done = teasr(*command, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    left = tmp_path / "home" / "runs" / "qwen-image-20b-1gpu"
    assert json.loads((left / "run.json").read_text())["position"]["steps"] == 1
    on_disk = {path.name for path in (left / "model").rglob("*")}
    assert {"model.json", "adapters.json", "noise", "condition"} <= on_disk
    assert load_model(left / "model").network.scale == 4
    longer = teasr(*command, "training.steps=2", home=tmp_path / "home")
    assert longer.returncode == 0, longer.stderr
    assert json.loads((left / "run.json").read_text())["position"]["steps"] == 2


@pytest.mark.journey
def test_two_workers_shard_a_pretrained_base(
    bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """ZeRO-3 over two processes that map the same files, in a Ray of three CPUs."""
    overrides = [
        *(f"data={data}", *of_base(bases["z-image"]), "backbone.frozen_bits=null", *SMALL),
        *("training.workers=2", "engine.zero_stage=3", "feed.crops_per_photo=2"),
        "training.preview_minutes=0",
    ]
    script = f"""
import ray
from pathlib import Path
ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="ERROR",
         log_to_driver=False, object_store_memory=200_000_000)
from jobs.distill import distill
from jobs.recipe import load_recipe
recipe = load_recipe("z-image-6b-1gpu", {[*overrides, "training.steps=2"]!r})
print(distill(recipe, Path({str(tmp_path / "run")!r})).position)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TEASR_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "'steps': 2" in done.stdout
    assert (tmp_path / "run" / "model" / "adapters.json").is_file()
