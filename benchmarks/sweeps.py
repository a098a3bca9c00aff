"""What a step of the objective costs where its parameters are streamed: few sweeps against many.

    python benchmarks/sweeps.py [--quick] [--layers 4] [--width 1536] [--side 4] [--nvme DIR]

Under ZeRO-3 with offloaded parameters every pass gathers all of them from host memory or from NVMe
files, a pass with gradient twice. On a GPU that carries a base of 20 billion parameters this is
what a step waits for: 40 GB at 25 GB/s are 1.6 s, one row of 512 pixels at 300 TFLOP/s is 0.3 s. A
CPU multiplies slower by orders of magnitude, so the regime is kept by few tokens: random weights in
the shape of Qwen-Image's layers, frozen, with LoRA on both branches, four tokens per branch, a
prompt of one. The last column says how it came out: seconds of a pass of one row without gradient
over those that each further row adds.

Steps of `passes: sequential`, `stacked` and `partitioned` take turns on one engine, and medians are
compared. The partitioned step has the four samples that it needs. Counted are elements that
DeepSpeed gathers over those that it could (small parameters stay gathered), and bytes read from
disk; its limits of what stays gathered are the default ones, scaled with the network's size.
Gradients of the three forms are compared first; the partitioned one's over all its deals. Without
libaio, a compiler or a folder for the files the NVMe part is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from teasr.backbones.branch_lora import LoraPair
from teasr.backbones.qwen_image import QwenImageBackbone
from teasr.engine import Engine, EngineSettings, prepare_offload
from teasr.errors import TeasrError
from teasr.objective import MicroBatch, Objective, ObjectiveSettings

FORMS = {"sequential": 1, "stacked": 1, "partitioned": 4}
"""Samples of a step."""
QWEN_IMAGE = 20.4e9
"""Elements of the network that DeepSpeed's default limits are scaled from."""


class ScaledSettings(EngineSettings):
    """Engine settings with DeepSpeed's limits in elements, scaled to a smaller network."""

    elements: int

    def deepspeed_config(self, *arguments: Any) -> dict[str, Any]:
        config = super().deepspeed_config(*arguments)
        share = self.elements / QWEN_IMAGE
        config["zero_optimization"] |= {
            "stage3_max_live_parameters": int(1e9 * share),
            "stage3_max_reuse_distance": int(1e9 * share),
            "stage3_prefetch_bucket_size": int(5e7 * share),
        }
        return config


def make_backbone(layers: int, width: int) -> QwenImageBackbone:
    """Random weights; the adapters are live, so that gradients reach all of them."""
    import diffusers

    torch.manual_seed(0)
    transformer: Any = diffusers.QwenImageTransformer2DModel(
        num_layers=layers, num_attention_heads=width // 128, joint_attention_dim=width
    )
    made = QwenImageBackbone(transformer, torch.randn(1, width), rank=16)
    for module in made.modules():
        if isinstance(module, LoraPair):
            torch.nn.init.normal_(module.lora_B.weight, std=0.02)
    return made


# ---------------------------------------------------------------------------------- what is counted


@dataclass
class Traffic:
    """Since the last `reset`."""

    gathered: int = 0
    """Elements that were gathered."""
    read: int = 0
    """Bytes read from disk."""
    _read_before: int = field(default=0, repr=False)

    def reset(self) -> None:
        self.gathered, self._read_before = 0, disk_reads()

    def stop(self) -> Traffic:
        return Traffic(self.gathered, disk_reads() - self._read_before)


def disk_reads() -> int:
    """Bytes that this process has had read from a disk."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes"):
            return int(line.split()[1])
    return 0


@contextmanager
def counted() -> Iterator[Traffic]:
    """Within: counts what DeepSpeed's coordinator gathers."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )

    name = "_PartitionedParameterCoordinator__all_gather_params_"
    plain, traffic = getattr(Coordinator, name), Traffic()

    def gather(self: Any, params: Any, *arguments: Any, **options: Any) -> None:
        missing = (p for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
        traffic.gathered += sum(p.ds_numel for p in missing)
        plain(self, params, *arguments, **options)

    setattr(Coordinator, name, gather)
    try:
        yield traffic
    finally:
        setattr(Coordinator, name, plain)


# ---------------------------------------------------------------------------------------- the step


def losses_of(
    engine: Engine, form: str, side: int, step: int = 0, samples: int | None = None
) -> Tensor:
    """Total of one step of `form` on random latents."""
    objective = Objective(ObjectiveSettings(passes=form, pixel_lpips=0))
    generator = torch.Generator().manual_seed(0)
    count = samples or FORMS[form]
    x, condition = torch.randn(2, count, 16, side, side, generator=generator)
    part = MicroBatch(step=step)
    return objective(engine.network, x, condition, generator, micro_batch=part).total


def gradients(engine: Engine, form: str, side: int, samples: int) -> Tensor:
    """Every gradient in one vector; of a partitioned form the mean over its deals. The step that
    follows moves nothing (`learning_rate`)."""
    from deepspeed.utils import safe_get_full_grad

    found: list[Tensor] = []
    deals = samples if form == "partitioned" else 1
    for step in range(deals):
        engine._engine.backward(losses_of(engine, form, side, step, samples))
        whole = (safe_get_full_grad(parameter) for parameter in engine._trainable())
        found.append(torch.cat([w.float().flatten() for w in whole if w is not None]))
        engine._engine.step()
    return torch.stack(found).mean(0)


def row_share(engine: Engine, side: int) -> float:
    """Seconds of a pass of one row over those that each further row adds."""
    more = 17
    x = torch.randn(more, 16, side, side, generator=torch.Generator().manual_seed(0))
    times: dict[int, list[float]] = {1: [], more: []}
    for _ in range(3):
        for count, values in times.items():
            t = torch.full((count,), 0.5)
            begin = time.perf_counter()
            with torch.no_grad():
                engine.network(x[:count], t, t, x[:count])
            values.append(time.perf_counter() - begin)
    one, many = (min(values) for values in times.values())
    return one * (more - 1) / (many - one) if many > one else float("inf")


def measure(arguments: argparse.Namespace, nvme: Path | None) -> dict[str, Any]:
    """Medians of interleaved steps with parameters in host memory, or in files under `nvme`."""
    backbone, side = make_backbone(arguments.layers, arguments.width), arguments.side
    elements = sum(p.numel() for p in backbone.parameters())
    settings = ScaledSettings(
        elements=elements,
        zero_stage=3,
        offload_parameters="nvme" if nvme else "cpu",
        offload_optimizer="cpu",
        nvme_path=str(nvme) if nvme else None,
        gradient_checkpointing=True,
        precision=arguments.precision,
        learning_rate=1e-30,  # every step meets the same weights
        warmup_share=0.0,
        ema_decay=0.0,
    )
    with counted() as traffic:
        engine = Engine(backbone, settings, micro_batch=1)
        parameters: list[Any] = list(backbone.parameters())
        sweep = sum(p.ds_numel for p in parameters if not p.ds_persist)
        expected = gradients(engine, "sequential", side, 1)
        scale = float(expected.abs().max())
        result: dict[str, Any] = {
            "elements": elements,
            "gradient_difference": float(
                (gradients(engine, "stacked", side, 1) - expected).abs().max()
            )
            / scale,
        }
        expected = gradients(engine, "stacked", side, 4)
        difference = gradients(engine, "partitioned", side, 4) - expected
        result["partitioned_difference"] = float(difference.abs().max() / expected.abs().max())
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        moved: dict[str, Traffic] = {}
        for _ in range(arguments.steps):
            for form in FORMS:
                traffic.reset()
                begin = time.perf_counter()
                engine.step(losses_of(engine, form, side), 0.0)
                times[form].append(time.perf_counter() - begin)
                moved[form] = traffic.stop()
        result["sweep_over_row"] = row_share(engine, side)
    itemsize = settings.dtype.itemsize
    for form, values in times.items():
        result[form] = {
            "seconds": statistics.median(values),
            "sweeps": moved[form].gathered / sweep,
            "gathered_gb": moved[form].gathered * itemsize / 1e9,
            "read_gb": moved[form].read / 1e9,
        }
    pairs = zip(times["sequential"], times["stacked"])
    result["speedup"] = statistics.median(slow / fast for slow, fast in pairs)
    engine._engine.destroy()
    return result


def show(name: str, result: dict[str, Any]) -> None:
    for form, samples in FORMS.items():
        found = result[form]
        print(
            f"| {name} | {form} | {samples} | {found['sweeps']:.1f} | {found['gathered_gb']:.1f} | "
            f"{found['read_gb']:.1f} | {found['seconds']:.2f} | {result['sweep_over_row']:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1536, help="a multiple of 128")
    parser.add_argument("--side", type=int, default=4, help="of the latents; 2 make a token")
    parser.add_argument("--steps", type=int, default=5, help="of each form, interleaved")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--nvme", type=Path, help="folder on a fast local disk, not in memory")
    parser.add_argument("--quick", action="store_true", help="a small network, one step of each")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.width, arguments.steps = 3, 768, 1
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # what DeepSpeed calls in torch
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    results = {"cpu": measure(arguments, None)}
    with tempfile.TemporaryDirectory(dir=arguments.nvme) as folder:
        try:
            path = Path(folder)
            prepare_offload(
                EngineSettings(zero_stage=3, offload_parameters="nvme", nvme_path=folder)
            )
        except TeasrError as error:
            print(f"NVMe is left out: {error}", file=sys.stderr)
        else:
            results["nvme"] = measure(arguments, path)

    cpu = results["cpu"]
    print(
        f"\n{cpu['elements'] / 1e6:.0f} million parameters, {arguments.layers} layers of width "
        f"{arguments.width}; load average {os.getloadavg()[0]:.1f}\n"
    )
    print(
        "| parameters in | passes | samples | sweeps | gathered (GB) | from disk (GB) | s/step ",
        end="",
    )
    print("| pass / row |\n|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        show({"cpu": "host memory", "nvme": "NVMe files"}[name], result)
    print(
        f"\nLargest difference of a gradient over the largest gradient: stacked "
        f"{cpu['gradient_difference']:.1e}, partitioned, mean of all deals, "
        f"{cpu['partitioned_difference']:.1e}"
    )
    document: dict[str, Any] = {
        "sweeps_sequential": round(cpu["sequential"]["sweeps"], 2),
        "sweeps_stacked": round(cpu["stacked"]["sweeps"], 2),
        "sweeps_partitioned": round(cpu["partitioned"]["sweeps"], 2),
        "gradient_difference": cpu["gradient_difference"],
        "partitioned_difference": cpu["partitioned_difference"],
    }
    for name, result in results.items():
        document[f"speedup_{name}_offload"] = round(result["speedup"], 2)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
