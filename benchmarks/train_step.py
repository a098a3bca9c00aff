"""Where a training step of the native network spends its time, and what its design saves.

    python benchmarks/train_step.py [--preset teasr-s] [--batch 8] [--crop 128] [--compile]

One step is forward, backward and AdamW on the squared error of one-step images, on one thread, in
the type that this machine multiplies fastest. Two versions with equal weights and equal results
take turns: the network as it is, and *plain*, the same equations as transformers are often written
(modulation per token, separate projections of queries, keys and values, attention by an explicit
softmax, convolutions in the default layout). A third row is what one would write first: tokens
alone, without convolutions, in patches of 8 pixels, the plain way. The medians of the ratios are
compared, and the profiler says what share of the time is matrix products, attention and
convolutions. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import cast

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from teasr.backbones import PRESETS, DualBranchDiT
from teasr.backbones.dit import (
    Branch,
    DiTSettings,
    DualBranchBlock,
    Prepared,
    _from_tokens,
    _to_tokens,
    rotary_table,
    rotate,
    upsample,
)
from teasr.backbones.folder import compute_dtype
from teasr.objective import interpolate, mean_square, one_step_image

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn_linear"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "convolutions": ("convolution",),
}


class PlainDiT(DualBranchDiT):
    """The same function of the same weights, written the plain way."""

    def prepare(self, condition: Tensor) -> Prepared:
        features = self.stem(self._whole_windows(condition, 1).to(self.dtype).contiguous())
        return Prepared(upsample(condition.float(), self.scale), features)

    def _residual(self, x_t: Tensor, t: Tensor, r: Tensor, local: Tensor) -> Tensor:
        settings = self.settings
        rows, columns = (side // settings.patch for side in local.shape[-2:])
        fine = functional.pixel_unshuffle(x_t, settings.scale)
        streams = (
            self.noise_tokens(_to_tokens(fine, settings.patch)),
            self.condition_tokens(_to_tokens(local, settings.patch)),
        )
        count = streams[0].shape[1]
        level = functional.silu(self.level_embedding(t.abs()))
        target = functional.silu(self.target_embedding(r))
        # One vector per token, projected per token and block.
        embeddings = tuple(
            embedding[:, None].expand(-1, count, -1).contiguous() for embedding in (level, target)
        )
        rotary = rotary_table(
            rows, columns, settings.width // settings.heads, x_t.device, x_t.dtype
        )
        for block in self.blocks:
            assert isinstance(block, DualBranchBlock)
            streams = self._plain_block(block, streams, embeddings, rotary)
        features = functional.layer_norm(streams[0], (settings.width,))
        features = _from_tokens(self.output_tokens(features), rows, columns, settings.patch)
        gain = self.fine_gain(level)[:, :, None, None]
        features = (features + local + gain * self.fine_features(fine)).contiguous()
        return cast(Tensor, self.head(features))

    def _plain_block(
        self,
        block: DualBranchBlock,
        streams: tuple[Tensor, Tensor],
        embeddings: tuple[Tensor, Tensor],
        rotary: Tensor,
    ) -> tuple[Tensor, Tensor]:
        heads, width = self.settings.heads, self.settings.width
        branches: tuple[Branch, Branch] = (block.noise, block.condition)
        projections = (self.level_modulation, self.target_modulation)
        parts = []
        for branch, projection, embedding in zip(branches, projections, embeddings):
            modulation = projection(embedding).unflatten(2, (6, width))
            modulation = modulation[:, :, : len(branch.modulation)] + branch.modulation
            parts.append(modulation.unbind(2))
        joint: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
        for branch, stream, (shift, scale, *_) in zip(branches, streams, parts):
            normal = functional.layer_norm(stream, (width,)) * (1 + scale) + shift
            names = ["query", "key", "value"] if branch.updates else ["key", "value"]
            weights = branch.qkv.weight.chunk(len(names))
            biases = branch.qkv.bias.chunk(len(names))
            for name, weight, bias in zip(names, weights, biases):
                projected = functional.linear(normal, weight, bias).unflatten(2, (heads, -1))
                if name == "query":
                    projected = rotate(branch.query_norm(projected), rotary)
                if name == "key":
                    projected = rotate(branch.key_norm(projected), rotary)
                joint[name].append(projected)
        query, key, value = (torch.cat(both, dim=1).transpose(1, 2) for both in joint.values())
        scores = query @ key.transpose(2, 3) / (width // heads) ** 0.5
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        result = []
        for branch, stream, part, new in zip(
            branches, streams, parts, mixed.split(streams[0].shape[1], dim=1)
        ):
            _, _, gate, shift, scale, mlp_gate = part
            stream = stream + gate * branch.project(new)
            normal = functional.layer_norm(stream, (width,)) * (1 + scale) + shift
            result.append(stream + mlp_gate * branch.mlp(normal))
        return result[0], result[1] if len(result) > 1 else streams[1]


def step_of(network: DualBranchDiT, batch: int, crop: int) -> Callable[[], None]:
    """One optimizer step on random pictures."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, crop, crop, generator=generator) * 2 - 1
    low = functional.interpolate(x, scale_factor=1 / network.scale, mode="area")
    noise = torch.randn(x.shape, generator=generator)
    t, r = torch.ones(batch), torch.zeros(batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        x_t = interpolate(x, noise, t)
        image = one_step_image(x_t, network(x_t, t, r, low), t)
        mean_square(image, x).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def shares(step: Callable[[], None], steps: int) -> dict[str, float]:
    """Share of a step's time by kind of operation; what is of no kind is elementwise work, copies
    and Python."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        total = time.perf_counter() - begin
    result = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        for kind, names in KINDS.items():
            if any(name in event.key for name in names):
                result[kind] += event.self_cpu_time_total / 1e6 / total
                break
    return {**result, "the rest": 1 - sum(result.values())}


def networks(settings: DiTSettings, dtype: torch.dtype) -> tuple[DualBranchDiT, PlainDiT]:
    """The network as it is and the plain one, with equal weights, after a check of their results.

    The last layers are made live, so that the check sees all others.
    """
    torch.manual_seed(0)
    network, plain = DualBranchDiT(settings), PlainDiT(settings)
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    plain.load_state_dict(network.state_dict())
    side = settings.patch * min(settings.window, 4)
    x, low = torch.randn(1, 3, 4 * side, 4 * side), torch.randn(1, 3, side, side)
    t, r = torch.tensor([0.7]), torch.tensor([0.2])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, r, low), plain(x, t, r, low), rtol=1e-3, atol=1e-3)
    return (
        network.to(dtype, memory_format=torch.channels_last),  # type: ignore[call-overload]
        plain.to(dtype),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="teasr-s", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings, dtype = PRESETS[arguments.preset], compute_dtype()
    if arguments.crop // settings.scale > settings.patch * settings.window:
        parser.error("the plain version attends to whole crops: choose a crop within one window")

    network, plain = networks(settings, dtype)
    steps = {
        "teasr": step_of(network, arguments.batch, arguments.crop),
        "plain": step_of(plain, arguments.batch, arguments.crop),
    }
    tokens = settings.model_copy(
        update={"patch": 2, "stem_depth": 0, "head_depth": 0, "window": arguments.crop // 8}
    )
    _, plain_tokens = networks(tokens, dtype)
    steps["tokens alone"] = step_of(plain_tokens, arguments.batch, arguments.crop)
    if arguments.compile:
        compiled, _ = networks(settings, dtype)
        compiled.compile()
        steps["torch.compile"] = step_of(compiled, arguments.batch, arguments.crop)
        print(f"compiled in {seconds(steps['torch.compile']):.0f} s")
    for step in steps.values():  # to warm up
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.steps):
        for name, step in steps.items():
            times[name].append(seconds(step))

    print(
        f"torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, one thread; "
        f"{arguments.preset}, batches of {arguments.batch} crops of {arguments.crop} pixels\n"
    )
    print(f"| | samples/s | {' | '.join((*KINDS, 'the rest'))} |")
    print("|---|" + "---|" * (len(KINDS) + 2))
    products = {}
    for name, step in steps.items():
        share = shares(step, 3)
        products[name] = 1 - share["the rest"]
        rate = arguments.batch / statistics.median(times[name])
        print(f"| {name} | {rate:.1f} | " + " | ".join(f"{v:.0%}" for v in share.values()) + " |")
    result = {
        "matrix_share": round(products["teasr"], 3),
        "plain_matrix_share": round(products["plain"], 3),
        "tokens_alone_matrix_share": round(products["tokens alone"], 3),
    }
    for name in ("plain", "tokens alone", "torch.compile"):
        if name in times:
            ratio = statistics.median(b / a for a, b in zip(times["teasr"], times[name]))
            result[f"speedup_over_{name}".translate(str.maketrans(". ", "__"))] = round(ratio, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
