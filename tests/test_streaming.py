"""A base on disk against the same network in memory: equal results, little memory, clear errors."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from teasr import streaming
from teasr.backbones.safetensors_files import INDEX_SUFFIX, STEM, find_tensors
from teasr.engine import Engine, EngineSettings
from teasr.errors import TeasrError, UsageError
from teasr.streaming import StreamedBase, StreamedEngine, write_random

WIDTH, DEPTH = 32, 4
BLOCKS = [f"blocks.{i}" for i in range(DEPTH)]
SETTINGS = EngineSettings(
    learning_rate=3e-3, weight_decay=0.1, warmup_share=0.5, gradient_clipping=0.5
)


class Block(nn.Module):
    """Frozen layers, and a LoRA pair beside them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.register_buffer("gain", torch.ones(width))
        self.lora: nn.Module | None = None

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.linear(self.norm(x)) * self.gain
        if self.lora is not None:
            z = z + self.lora(x)
        return x + torch.tanh(z), y + z


class Tower(nn.Module):
    """A stack of blocks with two streams, called as a `Velocity`."""

    def __init__(self, width: int = WIDTH, depth: int = DEPTH) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.leave = nn.Linear(width, width)
        self.gradient_checkpointing = False

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        x = y = self.enter(x_t + condition + (t - r)[:, None])
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, y = checkpoint(block, x, y, use_reentrant=False)
            else:
                x, y = block(x, y)
        return self.leave(x + y).float()


def add_lora(tower: Tower, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    tower.requires_grad_(False)
    for block in tower.blocks:
        width = block.linear.in_features
        block.lora = nn.Sequential(nn.Linear(width, 2), nn.Linear(2, width)).to(dtype)


def on_meta(dtype: torch.dtype = torch.float32) -> Tower:
    with torch.device("meta"):
        tower = Tower()
    tower.to(dtype)
    add_lora(tower, dtype)
    return tower


def in_memory(folder: Path, dtype: torch.dtype = torch.float32) -> Tower:
    tower = Tower().to(dtype)
    weights: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    tower.load_state_dict(weights)
    add_lora(tower, dtype)
    return tower


def written(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    with torch.device("meta"):
        tower = Tower()
    write_random(tower, folder, dtype, **options)
    return folder


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x_t, condition = torch.randn(2, 3, WIDTH, generator=generator).to(dtype)
    t = torch.rand(3, generator=generator).to(dtype)
    return x_t, t, 0 * t, condition


def loss_of(network: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Passes with gradient and without, stacked and alone, before one backward."""
    first = network(*(torch.cat([a, b]) for a, b in zip(inputs(1, dtype), inputs(2, dtype))))
    with torch.no_grad():
        still = network(*inputs(3, dtype))
    second = network(*inputs(4, dtype))
    return first.square().mean() + (second - still).square().mean()


def gradients(network: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in network.named_parameters()}


# ------------------------------------------------------------------------------- the same results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [{}, {"copies": True}, {"keep_bytes": 9000}])
def test_results_and_gradients_are_those_of_the_network_in_memory(
    tmp_path: Path, dtype: torch.dtype, checkpointing: bool, options: dict[str, Any]
) -> None:
    written(tmp_path, dtype, shard_bytes=9000)
    expected, streamed = in_memory(tmp_path, dtype), on_meta(dtype)
    base = StreamedBase(streamed, tmp_path, BLOCKS, **options)
    for network in (expected, streamed):
        network.gradient_checkpointing = checkpointing
        for _ in range(2):
            loss = loss_of(network, dtype)
            loss.backward()
    assert torch.equal(loss_of(streamed, dtype), loss_of(expected, dtype))
    found = gradients(streamed)
    for name, value in gradients(expected).items():
        if "lora" in name:
            assert value is not None and value.any(), name
            assert torch.equal(found[name], value), name  # type: ignore[arg-type]
        else:
            assert found[name] is None, name
    for name, parameter in streamed.named_parameters():
        assert parameter.dtype == dtype and parameter.requires_grad == ("lora" in name)
    base.close()
    assert torch.equal(loss_of(streamed, dtype), loss_of(expected, dtype))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_qwen_image(tmp_path: Path, checkpointing: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = {
        "num_layers": 3,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "axes_dims_rope": (8, 12, 12),
    }
    expected = diffusers.QwenImageTransformer2DModel(**config).to(torch.bfloat16)
    expected.save_pretrained(tmp_path, max_shard_size="500KB")
    with torch.device("meta"):
        streamed = diffusers.QwenImageTransformer2DModel(**config)
    blocks = [f"transformer_blocks.{i}" for i in range(3)]
    streamed.requires_grad_(False)
    with pytest.raises(UsageError, match=r"pos_embed\.pos_freqs.*ordinary memory"):
        StreamedBase(streamed, tmp_path, blocks, dtype=torch.bfloat16)
    streamed.pos_embed = expected.pos_embed
    # What is trained: an embedder of times in ordinary memory, seen by every block.
    trained = {}
    for network in (expected, streamed):
        network.requires_grad_(False)
    for network in (streamed, expected):
        torch.manual_seed(5)
        embedder = type(expected.time_text_embed)(expected.inner_dim).to(torch.bfloat16)
        network.time_text_embed = trained[network] = embedder
    base = StreamedBase(streamed, tmp_path, blocks, dtype=torch.bfloat16)
    image, prompt = torch.randn(2, 8, 64).bfloat16(), torch.randn(2, 3, 48).bfloat16()
    found = {}
    for network, embedder in trained.items():
        if checkpointing:
            network.enable_gradient_checkpointing()
        output = network(
            hidden_states=image,
            encoder_hidden_states=prompt,
            timestep=torch.tensor([0.3, 0.7]),
            img_shapes=[[(1, 2, 2), (1, 2, 2)]] * 2,
            return_dict=False,
        )[0]
        output.float().square().mean().backward()
        found[network] = [output, *(p.grad for p in embedder.parameters())]
    for ours, theirs in zip(found[streamed], found[expected]):
        assert theirs.any() and torch.equal(ours, theirs)
    assert base.traffic.sweeps == 2


def test_names_on_disk_may_differ(tmp_path: Path) -> None:
    written(tmp_path)
    wrapped = nn.Sequential(on_meta())
    blocks = [f"0.{name}" for name in BLOCKS]
    StreamedBase(wrapped, tmp_path, blocks, names=lambda name: name.removeprefix("0."))
    assert torch.equal(wrapped[0](*inputs(1)), in_memory(tmp_path)(*inputs(1)))


def test_a_parameter_with_two_names_stays_one(tmp_path: Path) -> None:
    written(tmp_path)
    tower = on_meta()
    tower.again = nn.Module()  # a name that the files do not know
    tower.again.weight = tower.enter.weight
    StreamedBase(tower, tmp_path, BLOCKS)
    assert tower.again.weight is tower.enter.weight
    assert torch.equal(tower.enter.weight, in_memory(tmp_path).enter.weight)


# ------------------------------------------------------------------------- what passes by, and when


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_visits_are_counted(tmp_path: Path, checkpointing: bool, copies: bool) -> None:
    written(tmp_path)
    tower = on_meta()
    tower.gradient_checkpointing = checkpointing
    base = StreamedBase(tower, tmp_path, BLOCKS, copies=copies)
    size = 4 * (WIDTH * WIDTH + 3 * WIDTH)
    assert base.traffic.block_bytes == [size] * DEPTH
    loss = loss_of(tower)
    assert base.traffic.visits == [3] * DEPTH
    loss.backward()
    assert base.traffic.visits == [5] * DEPTH  # recomputation and backward are one visit
    assert base.traffic.sweeps == 5
    assert base.traffic.bytes_visited == 5 * DEPTH * size
    # A block at a turn is still held; a wrong guess at a turn costs one.
    assert abs(sum(base.traffic.fetches) - 5 * DEPTH) <= 3
    assert base.traffic.bytes_fetched == sum(base.traffic.fetches) * size
    base.traffic.reset()
    assert base.traffic.sweeps == 0 and base.traffic.bytes_fetched == 0


def test_the_next_block_in_the_direction_of_travel_is_held_and_no_other(tmp_path: Path) -> None:
    written(tmp_path)
    tower = on_meta()
    tower.gradient_checkpointing = True
    base = StreamedBase(tower, tmp_path, BLOCKS)
    seen = []
    for i, block in enumerate(tower.blocks):
        block.norm.register_forward_pre_hook(lambda *_, i=i: seen.append((i, set(base._held))))
    tower(*inputs(1)).sum().backward()
    forward, backward = seen[:DEPTH], seen[DEPTH:]
    assert forward == [(i, {i, (i + 1) % DEPTH}) for i in range(DEPTH)]
    assert backward == [(i, {i, (i - 1) % DEPTH}) for i in reversed(range(DEPTH))]


def test_blocks_that_stay_are_fetched_once(tmp_path: Path) -> None:
    written(tmp_path)
    tower = on_meta()
    base = StreamedBase(tower, tmp_path, BLOCKS, keep_bytes=10_000)
    for _ in range(3):
        loss_of(tower).backward()
    assert base.traffic.fetches[:2] == [1, 1]
    assert min(base.traffic.fetches[2:]) > 5


MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from teasr.streaming import StreamedBase

torch.set_num_threads(1)

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

def step(layers):
    x = torch.ones(2, 2048, dtype=torch.bfloat16, requires_grad=True)
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False)
    x.sum().backward()

with torch.device("meta"):
    network = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(40))).bfloat16()
network.requires_grad_(False)
step([nn.Linear(2048, 2048).bfloat16().requires_grad_(False)])  # the libraries' own memory
before = {key: memory(key) for key in ("RssAnon", "RssFile")}
peak, stop = dict.fromkeys(before, 0), threading.Event()

def sample():
    while not stop.wait(0.001):
        for key in peak:
            peak[key] = max(peak[key], memory(key) - before[key])

sampler = threading.Thread(target=sample)
sampler.start()
base = StreamedBase(network, Path(sys.argv[1]), [str(i) for i in range(40)])
step(network)
step(network)
stop.set()
sampler.join()
print(base.traffic.sweeps, sum(base.traffic.block_bytes), peak["RssAnon"], peak["RssFile"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_stays_a_small_part_of_the_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(40)))
    write_random(network, tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    sweeps, total, anonymous, mapped = (float(word) for word in done.stdout.split())
    assert sweeps == 4 and total > 300e6
    assert anonymous < 0.1 * total
    assert mapped < 0.2 * total  # blocks pass by, and do not pile up


# --------------------------------------------------------------------------------------- errors


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """One file in place of the shards, with `change` made to its tensors."""
    weights: dict[str, Tensor] = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            weights |= load_file(path)
        path.unlink()
    change(weights)
    save_file(weights, folder / "model.safetensors")


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: rewrite(folder, lambda weights: weights.pop(name))


def put(name: str, value: Tensor) -> Callable[[Path], object]:
    return lambda folder: rewrite(folder, lambda weights: weights.update({name: value}))


def shard(folder: Path, number: int = 2) -> Path:
    return sorted(folder.glob("*.safetensors"))[number - 1]


def cut(folder: Path) -> None:
    os.truncate(shard(folder), shard(folder).stat().st_size - 1)


@pytest.mark.parametrize(
    ("harm", "kind", "message"),
    [
        (cut, TeasrError, r"00002-of-.* is cut off: '.*' ends at byte [\d,]+ of [\d,]+"),
        (drop("blocks.2.linear.bias"), UsageError, r"'blocks\.2\.linear\.bias' is missing in"),
        (drop("enter.bias"), UsageError, r"'enter\.bias' is missing in"),
        (drop("blocks.1.gain"), UsageError, r"'blocks\.1\.gain' is missing in"),
        (
            put("blocks.1.linear.weight", torch.ones(32, 31)),
            UsageError,
            r"'blocks\.1\.linear\.weight' .* has shape 32×31; the network expects 32×32",
        ),
        (
            put("blocks.1.linear.weight", torch.ones(32, 32).half()),
            UsageError,
            r"'blocks\.1\.linear\.weight' .* is float16; float32 is expected",
        ),
    ],
)
def test_what_is_wrong_with_the_files_is_named_before_anything_is_loaded(
    tmp_path: Path, harm: Callable[[Path], object], kind: type[TeasrError], message: str
) -> None:
    folder = written(tmp_path / "weights", shard_bytes=9000)
    harm(folder)
    tower = on_meta()
    with pytest.raises(kind, match=message):
        StreamedBase(tower, folder, BLOCKS)
    assert tower.enter.weight.is_meta and tower.blocks[0].linear.weight.is_meta


def with_values_missing(tower: Tower) -> None:
    tower.blocks[1].lora.to("meta")  # type: ignore[union-attr]


def with_a_cache(tower: Tower) -> None:
    tower.register_buffer("angles", torch.ones(2, device="meta"), persistent=False)


@pytest.mark.parametrize(
    ("change", "blocks", "message"),
    [
        (with_values_missing, BLOCKS, r"'blocks\.1\.lora\.0\.weight' is trained but has no values"),
        (with_a_cache, BLOCKS, "'angles' is on the meta device and no weights file holds it"),
        (lambda tower: None, ["blocks.9"], r"no block 'blocks\.9'.*enter, blocks, leave"),
        (lambda tower: None, [], "No blocks"),
    ],
)
def test_a_network_that_cannot_be_streamed_is_refused(
    tmp_path: Path, change: Callable[[Tower], object], blocks: list[str], message: str
) -> None:
    tower = on_meta()
    change(tower)
    with pytest.raises(UsageError, match=message):
        StreamedBase(tower, written(tmp_path), blocks)


# --------------------------------------------------------------------------------- random weights


def test_random_weights_are_scaled_and_whole(tmp_path: Path) -> None:
    with torch.device("meta"):
        tower = Tower(width=256)
    write_random(tower, tmp_path, torch.bfloat16, seed=3, shard_bytes=300_000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    places = find_tensors(tmp_path)
    weights: dict[str, Tensor] = {}
    for path in tmp_path.glob("*.safetensors"):
        weights |= load_file(path)
    assert set(weights) == set(places) == set(tower.state_dict())
    for name, value in weights.items():
        assert value.dtype == torch.bfloat16
        if "norm.weight" in name:
            assert (value == 1).all()
        elif value.ndim == 2:
            assert float(value.float().std()) == pytest.approx(1 / 16, rel=0.05)
            assert abs(float(value.float().mean())) < 1e-3
    assert not torch.equal(weights["blocks.0.linear.weight"], weights["blocks.1.linear.weight"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_writer_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch) -> None:
    whole = contents(written(tmp_path / "whole", shard_bytes=9000))
    left, genuine = [10], streaming._random

    def interrupted(name: str, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return genuine(name, *arguments)

    folder = tmp_path / "part"
    monkeypatch.setattr(streaming, "_random", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(folder, shard_bytes=9000)
    assert not list(folder.glob("*.json")) and list(folder.glob("*.partial"))
    first = shard(folder, 1).stat().st_mtime_ns
    monkeypatch.setattr(streaming, "_random", genuine)
    written(folder, shard_bytes=9000)
    assert contents(folder) == whole
    assert shard(folder, 1).stat().st_mtime_ns == first
    monkeypatch.setattr(streaming, "_random", interrupted)  # complete: nothing is written again
    written(folder, shard_bytes=9000)
    cut(folder)
    monkeypatch.setattr(streaming, "_random", genuine)
    written(folder, shard_bytes=9000)
    assert contents(folder) == whole


def test_another_seed_is_another_set(tmp_path: Path) -> None:
    first = contents(written(tmp_path))
    assert contents(written(tmp_path, seed=1)) != first
    assert len(contents(written(tmp_path, shard_bytes=9000))) > len(first)
    assert contents(written(tmp_path)) == first  # what was there before is gone


def test_weights_of_others_are_not_touched(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="holds other weights"):
        written(tmp_path)
    (tmp_path / f"{STEM}{INDEX_SUFFIX}").write_text('{"weight_map": {}}')
    with pytest.raises(UsageError, match="holds other weights"):
        written(tmp_path)


def test_a_disk_with_too_little_room_is_refused_before_writing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1000))
    with pytest.raises(TeasrError, match=r"needs .* GB for the weights; 1e-06 GB are free"):
        written(tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())


# ------------------------------------------------------------------------------------ the trainer


def made_engine(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> StreamedEngine:
    settings = EngineSettings.model_validate(SETTINGS.model_dump() | changes)
    return StreamedEngine(StreamedBase(on_meta(dtype), folder, BLOCKS), settings)


def plain_steps(tower: Tower, settings: EngineSettings, count: int) -> list[float]:
    """The same with what torch offers, on parameters in float32."""
    parameters = [p for p in tower.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, settings.betas, weight_decay=settings.weight_decay
    )
    norms = []
    for step in range(count):
        optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step / 10)
        for _ in range(settings.gradient_accumulation):
            (loss_of(tower) / settings.gradient_accumulation).backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, settings.gradient_clipping)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_engine_trains_as_plain_torch_does(tmp_path: Path, accumulation: int) -> None:
    engine = made_engine(written(tmp_path), gradient_accumulation=accumulation)
    start = {name: p.detach().clone() for name, p in engine.network.named_parameters()}
    norms = []
    for step in range(3 * accumulation):
        norm = engine.step(loss_of(engine.network), step // accumulation / 10)
        assert (norm is None) == ((step + 1) % accumulation != 0)
        norms += [] if norm is None else [norm]
    plain = in_memory(tmp_path)
    assert norms == pytest.approx(plain_steps(plain, engine.settings, 3))
    assert min(norms) > SETTINGS.gradient_clipping
    assert engine.steps == 3
    trained = engine.state_dict(average=False)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter.detach(), rtol=0, atol=0)
            assert not torch.equal(trained[name], start[name])
    for name, parameter in engine.network.named_parameters():
        if name not in trained:
            assert parameter.grad is None and torch.equal(parameter, start[name])


def test_small_steps_add_up_in_bfloat16(tmp_path: Path) -> None:
    """One step is less than the spacing of bfloat16; float32 masters keep it."""
    engine = made_engine(
        written(tmp_path, torch.bfloat16), torch.bfloat16, learning_rate=1e-6, weight_decay=0.0
    )
    start = engine.state_dict(average=False)
    for step in range(3):
        engine.step(loss_of(engine.network, torch.bfloat16), step / 10)
    for name, value in engine.state_dict(average=False).items():
        assert value.dtype == torch.float32 and not torch.equal(value, start[name])
        parameter = engine.network.get_parameter(name)
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, value.bfloat16())


def test_the_average_is_computed_with_and_put_back(tmp_path: Path) -> None:
    engine = made_engine(written(tmp_path))
    name = "blocks.1.lora.0.weight"
    average = engine.state_dict()[name]
    for step in range(3):
        engine.step(loss_of(engine.network), step / 10)
        decay = (2 + step) / (11 + step)
        average.lerp_(engine.state_dict(average=False)[name], 1 - decay)
    torch.testing.assert_close(engine.state_dict()[name], average)
    live = engine.network(*inputs(1)).detach()
    with torch.no_grad():
        averaged = engine.averaged_network(*inputs(1))
    assert not torch.equal(averaged, live)
    with torch.no_grad(), engine.averaged():
        assert torch.equal(engine.network(*inputs(1)), averaged)
    assert torch.equal(engine.network(*inputs(1)), live)
    without = made_engine(tmp_path, ema_decay=0)
    with without.averaged():
        pass
    assert set(without.state_dict()) == set(engine.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_continues_digit_for_digit(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = written(tmp_path / "weights", dtype)

    def advance(engine: StreamedEngine, start: int, count: int) -> list[float | None]:
        steps = range(start, start + count)
        return [engine.step(loss_of(engine.network, dtype), step / 10) for step in steps]

    straight = made_engine(weights, dtype)
    advance(straight, 0, 2)
    straight.save(tmp_path / "checkpoint", {"steps": 2, "position": {"samples": 6}})
    resumed = made_engine(weights, dtype)
    assert resumed.load(tmp_path / "checkpoint") == {"steps": 2, "position": {"samples": 6}}
    assert advance(resumed, 2, 3) == advance(straight, 2, 3)
    assert resumed.steps == straight.steps == 5
    for average in (False, True):
        for name, value in straight.state_dict(average).items():
            assert torch.equal(resumed.state_dict(average)[name], value), name
    assert (tmp_path / "checkpoint" / streaming.CHECKPOINT_FILE).stat().st_size < 100_000
    for folder, changes in ((tmp_path / "empty", {}), (tmp_path / "checkpoint", {"ema_decay": 0})):
        with pytest.raises(TeasrError, match="holds no checkpoint of this run"):
            made_engine(weights, dtype, **changes).load(folder)


def test_the_engine_has_the_interface_of_the_other() -> None:
    for name, method in inspect.getmembers(Engine, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(StreamedEngine, name))
            assert list(ours.parameters) == list(inspect.signature(method).parameters), name


def test_gradient_checkpointing_is_the_settings_choice(tmp_path: Path) -> None:
    engine = made_engine(written(tmp_path), gradient_checkpointing=True)
    assert engine.network.gradient_checkpointing
    assert not made_engine(tmp_path).network.gradient_checkpointing
    tower = nn.Sequential(nn.Linear(2, 2, device="meta").requires_grad_(False), nn.Linear(2, 2))
    save_file({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, tmp_path / "a.safetensors")
    base = StreamedBase(tower, tmp_path / "a.safetensors", ["0"])
    with pytest.raises(UsageError, match="Sequential cannot compute its activations a second time"):
        StreamedEngine(base, EngineSettings(gradient_checkpointing=True))


def test_an_engine_without_work_or_with_too_many_workers_is_refused(
    tmp_path: Path, monkeypatch
) -> None:
    base = StreamedBase(on_meta().requires_grad_(False), written(tmp_path), BLOCKS)
    with pytest.raises(UsageError, match="no trained parameters"):
        StreamedEngine(base, SETTINGS)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UsageError, match="trained by one worker"):
        StreamedEngine(base, SETTINGS)
