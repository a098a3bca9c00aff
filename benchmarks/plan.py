"""The planner against what is measured: peaks of real training steps on this machine's CPU.

    [MALLOC_MMAP_THRESHOLD_=65536] python benchmarks/plan.py [--only "NAME;..."]

Each configuration runs two optimizer steps in a process of its own: the real engine (DeepSpeed,
or a streamed base), the real objective with LPIPS, random pictures. Its anonymous memory (RssAnon)
is sampled from outside every 5 ms; the peak is compared with the plan's, which knows the
configuration and nothing of the measurement. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GB = 1e9
Z_SMALL = {
    "dim": 1024,
    "n_heads": 8,
    "n_kv_heads": 8,
    "n_layers": 10,
    "axes_dims": [32, 48, 48],
    "cap_feat_dim": 512,
}
"""A Z-Image of a third of the width and depth."""
Q_SMALL = {
    "num_layers": 8,
    "num_attention_heads": 8,
    "joint_attention_dim": 512,
}
"""A Qwen-Image of a third of the width and an eighth of the depth."""

LARGE = {"shape": "teasr-b", "batch": 2, "crop": 32}
"""Mostly weights and their states."""
WIDE = {"shape": "teasr-s", "batch": 8, "crop": 128}
"""Mostly activations."""
BASE = {"shape": "z-image", "batch": 2, "crop": 64, "gradient_checkpointing": True}
"""A frozen base with adapters, and an autoencoder."""
AWAY = {"offload_parameters": "cpu", "offload_optimizer": "cpu"}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "libraries": {"shape": "teasr-xs", "batch": 1, "crop": 32},
    "teasr-b, stage 0": {**LARGE, "zero_stage": 0},
    "teasr-b, stage 1": {**LARGE, "zero_stage": 1},
    "teasr-b, stage 1, optimizer offloaded": {**LARGE, "offload_optimizer": "cpu"},
    "teasr-b, stage 2": {**LARGE, "zero_stage": 2},
    "teasr-b, stage 3": {**LARGE, "zero_stage": 3},
    "teasr-b, stage 3, all offloaded": {**LARGE, "zero_stage": 3, **AWAY},
    "teasr-s, batch 8": WIDE,
    "teasr-s, batch 4": {**WIDE, "batch": 4},
    "teasr-s, batch 8, checkpointing": {**WIDE, "gradient_checkpointing": True},
    "Z-Image, third, stage 3, all offloaded": {**BASE, "zero_stage": 3, **AWAY},
    "Z-Image, third, streamed": {**BASE, "zero_stage": 0, "offload_parameters": "stream"},
}
HELD_OUT: dict[str, dict[str, Any]] = {
    "teasr-s, batch 6, crop 96": {**WIDE, "batch": 6, "crop": 96},
    "teasr-s, batch 4, one pass per row": {**WIDE, "batch": 4, "passes": "sequential"},
    "teasr-b, stage 2, batch 4, crop 64": {**LARGE, "zero_stage": 2, "batch": 4, "crop": 64},
    "Z-Image, third, rank 16, stage 1, crop 96": {**BASE, "rank": 16, "batch": 1, "crop": 96},
    "Z-Image, third, streamed, no checkpointing": {
        **BASE,
        **{"zero_stage": 0, "offload_parameters": "stream"},
        **{"batch": 1, "gradient_checkpointing": False},
    },
    "Qwen-Image, small, stage 3, all offloaded": {
        **{**BASE, "shape": "qwen-image", "batch": 1, "zero_stage": 3},
        **AWAY,
    },
}
"""Measured after the planner was finished; nothing in it was changed for them."""


def job_of(given: dict[str, Any]) -> Any:
    from teasr.backbones import PRESETS
    from teasr.engine import EngineSettings
    from teasr.objective import ObjectiveSettings
    from teasr.plan import Job
    from teasr.rehearsal import LatentShape

    known = {"shape", "batch", "crop", "rank", "passes"}
    engine = EngineSettings.model_validate(
        {"precision": "fp32", **{k: v for k, v in given.items() if k not in known}}
    )
    shape: Any = given["shape"]
    if shape in PRESETS:
        shape = PRESETS[shape]
    else:
        small = {"z-image": Z_SMALL, "qwen-image": Q_SMALL}[shape]
        config = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in small.items())
        shape = LatentShape(shape, given.get("rank", 64), config)
    objective = ObjectiveSettings(pixel_l1=1.0, passes=given.get("passes", "stacked"))
    return Job(shape, objective, engine, given["crop"], given["batch"])


# --------------------------------------------------------------------------------- one process


def run(given: dict[str, Any], steps: int = 2) -> None:
    """Train in this process."""
    import torch

    import jobs.training  # noqa: F401  all that a worker imports
    from teasr.backbones import DiTSettings, DualBranchDiT
    from teasr.engine import Engine, give_back_freed_memory
    from teasr.lpips import Lpips
    from teasr.objective import Objective
    from teasr.rehearsal import codec_of, network_of, perceptual_network

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    print("libraries", flush=True)
    sys.stdin.readline()

    job = job_of(given)
    latent = not isinstance(job.shape, DiTSettings)
    streamed = job.engine.offload_parameters == "stream"
    torch.manual_seed(0)
    if latent:
        give_back_freed_memory()  # as `jobs.networks`
    network: Any
    codec: Any = codec_of(job.shape, job.dtype)
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
    if latent:
        network = network_of(job.shape, job.dtype)
        codec = fill_codec(codec)
        network = fill(network, folder, job.dtype, streamed, mapped=job.engine.zero_stage < 3)
    else:
        network = DualBranchDiT(job.shape)
    empty = perceptual_network(job.dtype)
    weights = {}
    for kind, parts in (("weight", empty.kernels), ("bias", empty.biases)):
        weights |= {f"conv{i}.{kind}": torch.randn(p.shape) * 0.02 for i, p in enumerate(parts)}
    weights |= {f"lin{i}.weight": torch.rand(p.shape) for i, p in enumerate(empty.heads)}
    lpips = Lpips(weights, job.dtype)
    del weights, empty
    if streamed:
        from teasr.streaming import StreamedBase, StreamedEngine

        base = StreamedBase(network, folder, network.blocks, names=network.stored_name)
        engine: Any = StreamedEngine(base, job.engine)
    else:
        engine = Engine(network, job.engine, job.batch)
    objective = Objective(job.objective, lpips, codec.decode if latent else None)
    target = engine.averaged_network if job.engine.ema_decay > 0 else None
    begin = time.perf_counter()
    for step in range(steps):
        hr = torch.rand(job.batch, 3, job.crop, job.crop) * 2 - 1
        lr = torch.nn.functional.interpolate(hr, scale_factor=0.25, mode="area")
        x, condition = codec.encode(hr), codec.condition(lr)
        others: dict[str, Any] = {"pictures": hr} if latent else {}
        losses = objective(
            engine.network,
            x,
            condition,
            torch.Generator().manual_seed(step),
            target_network=target,
            **others,
        )
        print("forward", flush=True)
        engine.step(losses.total, 0.5)
        print("step", flush=True)
        del losses
    print(f"seconds {(time.perf_counter() - begin) / steps}", flush=True)
    shutil.rmtree(folder)


def fill_codec(codec: Any) -> Any:
    codec.autoencoder.to_empty(device="cpu")
    import torch

    for parameter in codec.autoencoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    codec.mean, codec.std = torch.zeros(()), torch.ones(())
    return codec


def fill(network: Any, folder: Path, dtype: Any, streamed: bool, mapped: bool) -> Any:
    """Values for what is on `meta`. Frozen ones are in files in `folder`, to be streamed or mapped
    as `jobs.networks` does it below stage 3."""
    import torch

    from teasr.streaming import write_random

    if streamed:
        plain = {network.stored_name(n): p for n, p in network.named_parameters()}

        class Plain:
            def state_dict(self) -> dict[str, Any]:
                return {n: p for n, p in plain.items() if not p.requires_grad}

        write_random(Plain(), folder, dtype)  # type: ignore[arg-type]
    made: dict[int, Any] = {}
    for module in network.modules():
        for name, old in module._parameters.items():
            if old is None or (streamed and not old.requires_grad):
                continue
            if id(old) not in made:
                if mapped and not old.requires_grad:
                    file = str(folder / f"{len(made)}.weights")
                    values = torch.from_file(file, True, old.numel(), dtype=old.dtype)
                    values = values.normal_(std=0.02).view(old.shape)
                else:
                    values = torch.randn(old.shape, dtype=old.dtype).mul_(0.02)
                made[id(old)] = torch.nn.Parameter(values, requires_grad=old.requires_grad)
            module._parameters[name] = made[id(old)]
    network.prompt = torch.randn(network.prompt.shape).to(network.dtype)
    return network


# ------------------------------------------------------------------------------------ the parent


def anonymous(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def measure(given: dict[str, Any]) -> dict[str, float]:
    """Peaks of a process that trains: in all, and by stretch."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--run", json.dumps(given)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    assert process.stdout and process.stdin
    os.set_blocking(process.stdout.fileno(), False)
    peaks: dict[str, float] = {}
    stretch_peak = 0.0
    seconds = libraries = 0.0
    while process.poll() is None:
        try:
            now = anonymous(process.pid)
        except OSError:
            break
        stretch_peak = max(stretch_peak, now)
        for line in process.stdout.readlines() or []:
            word, _, value = line.strip().partition(" ")
            if word == "libraries":
                libraries = now
                process.stdin.write("\n")
                process.stdin.flush()
            elif word == "seconds":
                seconds = float(value)
            elif word not in ("forward", "step"):
                continue
            peaks[word] = max(peaks.get(word, 0.0), stretch_peak)
            stretch_peak = 0.0
        time.sleep(0.005)
    if process.wait():
        raise SystemExit(f"{given}: the process ended with code {process.returncode}")
    return {
        "libraries": libraries,
        "peak": max(v for k, v in peaks.items() if k in ("forward", "step")),
        "forward": peaks["forward"],
        "step": peaks["step"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of configurations, by their beginnings")
    parser.add_argument("--detail", action="store_true", help="parts of each plan")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(json.loads(arguments.run))
        return
    from teasr.plan import sheet_of

    rows = {}
    for name, given in {**CONFIGURATIONS, **HELD_OUT}.items():
        if arguments.only and not any(name.startswith(o) for o in arguments.only.split(";")):
            continue
        sheet = sheet_of(job_of(given))
        predicted = sheet.peak("host")
        found = measure(given)
        ratio = predicted / found["peak"]
        rows[name] = {
            "predicted_gb": round(predicted / GB, 3),
            "measured_gb": round(found["peak"] / GB, 3),
            "ratio": round(ratio, 3),
            "libraries_gb": round(found["libraries"] / GB, 3),
            "phase": sheet.peak_phase("host"),
            "forward_gb": round(found["forward"] / GB, 3),
            "seconds": round(found["seconds"], 2),
        }
        print(name, rows[name], file=sys.stderr, flush=True)
        if arguments.detail:
            for part in sheet.at_peak("host"):
                print(f"    {part.name:40} {part.size / GB:.3f}", file=sys.stderr)
            top = {
                n: sum(p.size for p in ps if p.place == "host") for n, ps in sheet.phases.items()
            }
            print("   ", {n: round(v / GB, 2) for n, v in top.items()}, file=sys.stderr, flush=True)
    print("| configuration | predicted (GB) | measured (GB) | ratio |")
    print("|---|---:|---:|---:|")
    for name, row in rows.items():
        print(f"| {name} | {row['predicted_gb']} | {row['measured_gb']} | {row['ratio']} |")
    ratios = [row["ratio"] for row in rows.values()]
    worst = max(abs(ratio - 1) for ratio in ratios)
    print(json.dumps({"configurations": rows, "worst_deviation": round(worst, 3)}))


if __name__ == "__main__":
    main()
