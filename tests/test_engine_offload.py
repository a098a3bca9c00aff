"""Where parameters and optimizer states are, and by how many workers they are held, changes
nothing of what is learned. Workers are processes of their own, as in test_engine.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import PLAIN, SPAWN, _join, advance, network
from torch import Tensor

from teasr import checkpoints, engine
from teasr.backbones.branch_lora import LoraPair
from teasr.backbones.dit import PRESETS, DiTSettings, DualBranchDiT
from teasr.backbones.latent import LatentBackbone
from teasr.backbones.qwen_image import QwenImageBackbone
from teasr.backbones.z_image import ZImageBackbone
from teasr.engine import Engine, EngineSettings, NvmeBuffers, check_offload
from teasr.errors import TeasrError, UsageError
from teasr.objective import TERMS, MicroBatch, Objective, ObjectiveSettings
from tests.ports import free_port

STAGES = (1, 3)


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable[..., Any]]:
    """`apart(function, *arguments)` in a process of its own that stands for a training worker."""
    with ProcessPoolExecutor(1, SPAWN, initializer=_join, initargs=(free_port(),)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=500)


# ------------------------------------------------------------------- what runs in other processes


def partly_frozen_engine(seed: int, **settings: Any) -> Engine:
    """An engine around a network whose convolutions are frozen, and equal whatever the seed."""
    made = network(seed)
    frozen = network(7)
    for part in ("stem", "head"):
        getattr(made, part).load_state_dict(getattr(frozen, part).state_dict())
        getattr(made, part).requires_grad_(False)
    return Engine(made, EngineSettings.model_validate(PLAIN | settings), micro_batch=2)


def everything(made: Engine) -> dict[str, Tensor]:
    """Whole weights, their average and the optimizer's moments, by name."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    result = {f"average {name}": value for name, value in made.state_dict().items()}
    for name, parameter in made._named_trainable():
        result[f"weight {name}"] = safe_get_full_fp32_param(parameter).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            whole = safe_get_full_optimizer_state(parameter, moment)
            result[f"{moment} {name}"] = whole.clone()
    return result


def one_phase(folder: Path, name: str, source: str | None, stage: int) -> None:
    """Take up `source` if there is one, save what was taken up, then a few steps and a checkpoint
    `name`."""
    settings = {"zero_stage": stage, "ema_decay": 0.9}
    made = partly_frozen_engine(seed=len(name), **settings)
    found: dict[str, Any] = {}
    if source:
        state = made.load(folder / f"{source}-{stage}")
        assert state == {"name": source}
        found["loaded"], found["steps"] = everything(made), made.steps
    found["losses"] = [loss for loss, _ in advance(made, made.steps, 2)]
    found["saved"] = everything(made)
    made.save(folder / f"{name}-{stage}", {"name": name})
    if not source:
        found["straight"] = [*found["losses"], *(loss for loss, _ in advance(made, 2, 4))]
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / f"{name}-{stage}.pt")


def phases(port: int, rank: int, workers: int, folder: str, name: str, source: str | None) -> None:
    _join(port, rank, workers)
    for stage in STAGES:
        one_phase(Path(folder), name, source, stage)


def run_phase(workers: int, folder: Path, name: str, source: str | None) -> None:
    port = free_port()
    arguments = [(port, rank, workers, str(folder), name, source) for rank in range(workers)]
    started = [SPAWN.Process(target=phases, args=each) for each in arguments]
    for process in started:
        process.start()
    for process in started:
        process.join(400)
        assert process.exitcode == 0


# ------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two workers, one, and two again, each from the checkpoint of the one before."""
    folder = tmp_path_factory.mktemp("workers")
    run_phase(2, folder, "first", None)
    run_phase(1, folder, "second", "first")
    run_phase(2, folder, "third", "second")
    return folder


@pytest.mark.journey
@pytest.mark.parametrize("stage", STAGES)
def test_another_number_of_workers_takes_up_the_same_state(changing: Path, stage: int) -> None:
    first, second, third = (
        torch.load(changing / f"{name}-{stage}.pt", weights_only=True)
        for name in ("first", "second", "third")
    )
    for before, after in ((first, second), (second, third)):
        assert before["saved"].keys() == after["loaded"].keys()
        for name, value in before["saved"].items():
            assert torch.equal(after["loaded"][name], value), name
    assert (second["steps"], third["steps"]) == (2, 4)
    assert any(value.any() for name, value in third["loaded"].items() if "exp_avg_sq" in name)
    layouts = [checkpoints.Layout.read(changing / f"{n}-{stage}") for n in ("first", "second")]
    assert [layout.workers for layout in layouts] == [2, 1]


@pytest.mark.journey
@pytest.mark.parametrize("stage", STAGES)
def test_the_losses_go_on_where_they_were(changing: Path, stage: int) -> None:
    """All workers see the same samples here: whatever their number, they learn the same."""
    runs = [
        torch.load(changing / f"{name}-{stage}.pt", weights_only=True)
        for name in ("first", "second", "third")
    ]
    losses = [loss for run in runs for loss in run["losses"]]
    assert losses == pytest.approx(runs[0]["straight"], rel=1e-4)


@pytest.mark.journey
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_are_in_no_file_of_a_checkpoint(changing: Path, stage: int) -> None:
    folder = changing / f"first-{stage}"
    saved = [path for path in folder.rglob("*.pt") if "optim_states" not in path.name]
    assert saved
    for path in saved:
        content = torch.load(path, map_location="cpu", weights_only=False)
        names = content.get("module", content)
        assert not [name for name in names if name.startswith(("stem", "head"))], path
        assert not content.get("frozen_param_fragments")
    trained = sum(
        p.numel() for n, p in network().named_parameters() if n[:4] not in ("stem", "head")
    )
    optimizer = sum(path.stat().st_size for path in folder.rglob("*optim_states.pt"))
    assert optimizer < 1.3 * 12 * trained + 100_000  # fp32 weights and two moments


# ---------------------------------------------------------------- the objective under each engine

WIDE = DiTSettings(width=512, depth=2, heads=4, local_width=16, stem_depth=1, head_depth=1)
"""Its largest parameters have more than `SWAPPED_BYTES`, and go to NVMe."""


def objective_network(settings: DiTSettings) -> DualBranchDiT:
    torch.manual_seed(3)
    made = DualBranchDiT(settings)
    for parameter in made.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return made


class FakeLpips:
    """Some perceptual distance: what it is plays no part here."""

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).diff(dim=-1).square().flatten(1).mean(1)


def objective_of(passes: str, network: Any) -> Tensor:
    settings = ObjectiveSettings(
        pixel_l1=0.5,
        pixel_even=0.5,
        pixel_floor=0.5,
        self_adversarial=0.3,
        passes=passes,  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(11)
    x = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    low = torch.nn.functional.interpolate(x, scale_factor=0.25, mode="area")
    losses = Objective(settings, FakeLpips())(network, x, low, generator)  # type: ignore[arg-type]
    assert set(losses.terms) == set(TERMS)
    return losses.total


def plain_gradients(passes: str, settings: DiTSettings) -> dict[str, Tensor]:
    made = objective_network(settings)
    objective_of(passes, made).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in made.named_parameters()
    }


def engine_gradients(
    passes: str, settings: DiTSettings, changes: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(gradients, weights after the step)."""
    from deepspeed.utils import safe_get_full_grad

    made = Engine(
        objective_network(settings), EngineSettings.model_validate(PLAIN | changes), micro_batch=2
    )
    made._engine.backward(objective_of(passes, made.network))
    gradients = {}
    for name, parameter in made._named_trainable():
        whole = parameter.grad if made.settings.zero_stage == 0 else safe_get_full_grad(parameter)
        gradients[name] = (torch.zeros_like(parameter) if whole is None else whole).clone()
    made._engine.step()
    before, after = made.state_dict(), made.state_dict(average=False)
    with made.averaged():
        pass
    again = made.state_dict(average=False)
    assert all(torch.equal(value, again[name]) for name, value in after.items())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    return gradients, after


OFFLOADED = {"zero_stage": 3, "offload_parameters": "cpu", "offload_optimizer": "cpu"}


@pytest.mark.parametrize("passes", ["stacked", "sequential"])
def test_the_objective_has_the_gradients_of_plain_torch(
    apart: Callable[..., Any], passes: str
) -> None:
    settings = PRESETS["teasr-xs"]
    plain = plain_gradients("sequential", settings)
    for changes in (
        {"zero_stage": 0},
        {"zero_stage": 3},
        OFFLOADED,
        OFFLOADED | {"gradient_checkpointing": True},
    ):
        found, _ = apart(engine_gradients, passes, settings, changes)
        assert_gradients(found, plain, str(changes))


def assert_gradients(found: dict[str, Tensor], plain: dict[str, Tensor], which: str) -> None:
    assert found.keys() == plain.keys()
    scale = max(float(value.abs().max()) for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(
            found[name].view_as(value), value, rtol=1e-3, atol=1e-5 * scale, msg=f"{name} {which}"
        )


def dealt_loss(network: Any, part: MicroBatch) -> Tensor:
    """Total of one sample of a step of several: each has another role."""
    generator = torch.Generator().manual_seed(part.index)
    x = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    low = torch.nn.functional.interpolate(x, scale_factor=0.25, mode="area")
    objective = Objective(ObjectiveSettings(passes="partitioned", pixel_lpips=0))
    return objective(network, x, low, generator, micro_batch=part).total


def dealt_gradients(count: int) -> dict[str, Tensor]:
    """Of the second step, whose deal is another one."""
    from deepspeed.utils import safe_get_full_grad

    chosen = {"zero_stage": 3, "gradient_accumulation": count, "learning_rate": 1e-30}
    settings = EngineSettings.model_validate(PLAIN | chosen)
    made = Engine(objective_network(PRESETS["teasr-xs"]), settings, micro_batch=1)
    for index in range(2 * count):
        assert (made.accumulated, made.steps) == (index % count, index // count)
        part = MicroBatch(made.accumulated, count, made.steps)
        loss = dealt_loss(made.network, part)
        if index < 2 * count - 1:
            made.step(loss, 0.5)
    made._engine.backward(loss)
    return {name: safe_get_full_grad(p).clone() for name, p in made._named_trainable()}


def test_roles_go_round_over_micro_batches_of_one_sample(apart: Callable[..., Any]) -> None:
    count = 5
    found = apart(dealt_gradients, count)
    plain = objective_network(PRESETS["teasr-xs"])
    for index in range(count):
        (dealt_loss(plain, MicroBatch(index, count, 1)) / count).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in plain.named_parameters()
    }
    assert_gradients(found, gradients, "partitioned")


def asynchronous_io_is_compiled() -> bool:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    return any(root.rglob("async_io.so"))


@pytest.mark.skipif(
    not asynchronous_io_is_compiled(), reason="DeepSpeed's async_io takes minutes to compile"
)
def test_parameters_on_nvme_have_the_same_gradients(
    apart: Callable[..., Any], tmp_path: Path
) -> None:
    plain = plain_gradients("sequential", WIDE)
    on_nvme = {"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": str(tmp_path)}
    for passes in ("stacked", "sequential"):
        found, _ = apart(engine_gradients, passes, WIDE, on_nvme)
        assert_gradients(found, plain, passes)
        assert list(tmp_path.rglob("*.swp"))
    path = tmp_path / "checkpoint"
    before, after = apart(resumed_from_nvme, str(path), on_nvme)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def adapted_network(kind: str) -> LatentBackbone:
    """Frozen weights and adapters of a pretrained backbone's shape, few and wide: the larger go to
    NVMe also where two workers share them."""
    import diffusers

    torch.manual_seed(0)
    transformer: Any
    if kind == "qwen-image":
        transformer = diffusers.QwenImageTransformer2DModel(
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=32,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
            in_channels=16,
            out_channels=4,
        )
        made: LatentBackbone = QwenImageBackbone(transformer, torch.randn(3, 24), rank=4)
    else:
        transformer = diffusers.ZImageTransformer2DModel(
            n_layers=3,
            n_refiner_layers=1,
            dim=512,
            n_heads=32,
            n_kv_heads=32,
            cap_feat_dim=24,
            in_channels=4,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 64, 64],
        )
        made = ZImageBackbone(transformer, torch.randn(3, 24), rank=4)
    for part in made.modules():
        if isinstance(part, LoraPair):
            torch.nn.init.normal_(part.lora_B.weight, std=0.05)
    return made


def latent_objective(passes: str, network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, condition = torch.randn(2, 4, 4, 4, 4, generator=generator)
    settings = ObjectiveSettings(passes=passes, pixel_lpips=0)  # type: ignore[arg-type]
    return Objective(settings)(network, x, condition, generator).total


def adapted_gradients(
    port: int, rank: int, workers: int, kind: str, folder: str, cases: list[tuple[str, bool]]
) -> None:
    """A step each of (passes, gradient checkpointing) on one engine; nothing moves."""
    _join(port, rank, workers)
    from deepspeed.utils import safe_get_full_grad

    on_nvme = {"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": folder}
    settings = EngineSettings.model_validate(PLAIN | on_nvme | {"learning_rate": 1e-30})
    made = Engine(adapted_network(kind), settings, micro_batch=4)
    found = []
    for passes, checkpointing in cases:
        made.network.module.gradient_checkpointing = checkpointing
        made._engine.backward(latent_objective(passes, made.network))
        named = made._named_trainable()
        found.append({name: safe_get_full_grad(p).clone() for name, p in named})
        made._engine.step()
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")


@pytest.mark.skipif(
    not asynchronous_io_is_compiled(), reason="DeepSpeed's async_io takes minutes to compile"
)
@pytest.mark.parametrize(("kind", "workers"), [("qwen-image", 2), ("z-image", 1)])
def test_adapters_on_a_base_on_nvme_have_the_same_gradients(
    tmp_path: Path, kind: str, workers: int
) -> None:
    """Pass after pass there are buffers for what is needed, in one process and in two."""
    cases = [("stacked", False), ("partitioned", False), ("stacked", True), ("sequential", True)]
    port = free_port()
    arguments = [(port, rank, workers, kind, str(tmp_path), cases) for rank in range(workers)]
    started = [SPAWN.Process(target=adapted_gradients, args=each) for each in arguments]
    for process in started:
        process.start()
    for process in started:
        process.join(400)
        assert process.exitcode == 0
    assert list(tmp_path.rglob("*.swp"))
    for (passes, _), found in zip(cases, torch.load(tmp_path / "gradients.pt"), strict=True):
        made = adapted_network(kind)
        latent_objective(passes, made).backward()
        plain = {name: p.grad for name, p in made.trainable().items() if p.grad is not None}
        assert_gradients(found, plain, passes)


def resumed_from_nvme(
    folder: str, changes: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and average two steps after a checkpoint: straight on, and by another engine."""
    results = []
    chosen = EngineSettings.model_validate(PLAIN | changes)
    for stop in (False, True):
        made = Engine(objective_network(WIDE), chosen, micro_batch=2)
        if stop:
            made.load(Path(folder))
        else:
            made.step(objective_of("stacked", made.network), 0.1)
            made.save(Path(folder), {})
        for _ in range(2):
            made.step(objective_of("stacked", made.network), 0.2)
        weights, average = made.state_dict(average=False), made.state_dict()
        results.append(weights | {f"average {name}": value for name, value in average.items()})
    return results[0], results[1]


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"offload_optimizer": "nvme"}, "loses the moments of an optimizer on NVMe"),
        ({"offload_parameters": "cpu", "zero_stage": 2}, "needs zero_stage 3"),
        ({"offload_parameters": "nvme", "zero_stage": 3}, "needs nvme_path"),
        ({"offload_parameters": "disk"}, "engine: 'offload_parameters'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        EngineSettings.from_mapping(given, "engine")
    assert EngineSettings(offload_optimizer=True).offload_optimizer == "cpu"  # type: ignore[arg-type]


def test_what_the_machine_cannot_do_is_refused_and_what_remains_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(path: Path) -> EngineSettings:
        return EngineSettings(zero_stage=3, offload_parameters="nvme", nvme_path=str(path))

    class Io:
        def __init__(self, there: bool) -> None:
            self.is_compatible = lambda: there

    remains = "engine.offload_parameters=cpu"
    with pytest.raises(UsageError, match=f"is not a folder on this machine.*{remains}"):
        check_offload(settings(tmp_path / "none"))
    monkeypatch.setattr(engine.os, "access", lambda *_: False)
    with pytest.raises(UsageError, match=f"is not writable.*{remains}"):
        check_offload(settings(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(engine, "_asynchronous_io", lambda: Io(False))
    with pytest.raises(UsageError, match=f"libaio.*apt-get install libaio-dev.*{remains}"):
        check_offload(settings(tmp_path))
    monkeypatch.setattr(engine, "_asynchronous_io", lambda: Io(True))
    check_offload(settings(tmp_path))
    monkeypatch.setattr(engine.shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match=f"no C\\+\\+ compiler.*{remains}"):
        check_offload(settings(tmp_path))
    check_offload(EngineSettings(zero_stage=3, offload_parameters="cpu", offload_optimizer="cpu"))


def test_nvme_buffers_hold_the_largest_block() -> None:
    buffers = NvmeBuffers.for_network(DualBranchDiT(WIDE), 4, workers=1)
    large = [
        p.numel()
        for block in DualBranchDiT(WIDE).blocks
        for p in block.parameters()
        if 4 * p.numel() >= engine.SWAPPED_BYTES
    ]
    assert buffers.count >= len(large) / 2
    assert buffers.elements >= max(large)
    chosen = EngineSettings(zero_stage=3, offload_parameters="nvme", nvme_path="/fast")
    assert chosen.deepspeed_config(1, buffers)["zero_optimization"]["offload_param"] == {
        "device": "nvme",
        "nvme_path": "/fast",
        "pin_memory": torch.cuda.is_available(),
        "max_in_cpu": engine.TRAINED_IN_MEMORY,
        "buffer_count": buffers.count,
        "buffer_size": buffers.elements,
    }


def test_more_than_deepspeed_can_load_from_nvme_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = EngineSettings(zero_stage=3, offload_parameters="nvme", nvme_path="/fast")
    monkeypatch.setattr(engine, "TRAINED_IN_MEMORY", 100)
    made = torch.nn.Linear(10, 20, bias=False)
    engine._check_trained_size(made, chosen, workers=2)
    with pytest.raises(UsageError, match=r"cannot load checkpoints.*offload_parameters=cpu"):
        engine._check_trained_size(made, chosen, workers=1)
    engine._check_trained_size(made.requires_grad_(False), chosen, workers=1)


def test_checkpointing_a_network_that_cannot_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gradient_checkpointing: Linear cannot"):
        engine._prepare(torch.nn.Linear(2, 2), EngineSettings(gradient_checkpointing=True))
    made = network()
    engine._prepare(made, EngineSettings(gradient_checkpointing=True))
    assert made.gradient_checkpointing


def test_a_checkpoint_with_a_missing_part_is_told(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    layout = checkpoints.Layout(workers=2, zero_stage=3, average=True)
    layout.write(tmp_path)
    checkpoints.save_average(tmp_path, {"weight": torch.ones(3)}, rank=0)
    with pytest.raises(TeasrError, match=r"average-1\.pt is missing"):
        checkpoints.Layout.read(tmp_path)
    checkpoints.save_average(tmp_path, {"weight": torch.zeros(3)}, rank=1)
    whole = checkpoints.load_average(tmp_path, checkpoints.Layout.read(tmp_path))["weight"]
    assert whole.tolist() == [1, 1, 1, 0, 0, 0]
    parts = [checkpoints.partition(whole, 5, rank, 3).tolist() for rank in range(3)]
    assert parts == [[1, 1], [1, 0], [0, 0]]
