"""DISTS, deep image structure and texture similarity (Ding et al. 2020, arXiv 2004.07728).

VGG16 with every max-pool replaced by a Hann-weighted L2 pool looks at both pictures. Per channel of
the pictures themselves and of five of its ReLUs, the means are compared as texture and the
covariance as structure (the paper's equations 6 to 8):

    l = (2 mx my + c) / (mx^2 + my^2 + c)        s = (2 sxy + c) / (sx^2 + sy^2 + c)
    d(x, y) = 1 - sum_k (alpha_k l_k + beta_k s_k),    sum_k (alpha_k + beta_k) = 1

Weights come from a safetensors file with `conv{i}.weight`, `conv{i}.bias` as for LPIPS (VGG16), and
`alpha` and `beta` (1, 1475, 1, 1): a number per channel, in the order picture, then taps. Where
torchvision and its ImageNet weights are at hand, `alpha` and `beta` alone will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from teasr.errors import TeasrError
from teasr.lpips import check_names, convolutions, find_file, read_weights

CONVOLUTIONS = 13
TAPS = (1, 3, 6, 9, 12)  # convolutions whose ReLU is looked at
POOL_BEFORE = (2, 4, 7, 10)
_STABLE = 1e-6


class Dists(nn.Module):
    """The distance network, frozen.

    Args:
        weights: tensors by name.
        source: named in errors.

    Raises:
        TeasrError: naming the tensors that are missing, unknown or of a wrong shape.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: Mapping[str, Tensor], source: str = "DISTS weights") -> None:
        super().__init__()
        _check(weights, source)
        for name, tensor in weights.items():
            self.register_buffer(name.replace(".", "_"), tensor.float())
        # ImageNet's, in the range [0, 1].
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """From a safetensors file.

        Raises:
            TeasrError: when the file cannot be read or does not hold the tensors.
            UsageError: when it lacks the convolutions and torchvision has none.
        """
        weights = read_weights(path, "DISTS")
        if set(weights) == {"alpha", "beta"}:
            weights |= convolutions("vgg")
        return cls(weights, str(path))

    def forward(self, restored: Tensor, original: Tensor) -> Tensor:
        """Distances (N,), 0 for equal pictures.

        Args:
            restored, original: (N, 3, H, W) in [0, 1], of any size; the paper's figures are of
                pictures whose smaller side is 256.

        Raises:
            ValueError: when the shapes differ.
        """
        if restored.shape != original.shape or restored.ndim != 4 or restored.shape[1] != 3:
            raise ValueError(
                "two batches (N, 3, H, W) of one shape expected, "
                f"{tuple(restored.shape)} and {tuple(original.shape)} given"
            )
        unlike = []
        for x, y in zip(self._features(restored), self._features(original)):
            mean_x, mean_y = x.mean(dim=(2, 3), keepdim=True), y.mean(dim=(2, 3), keepdim=True)
            x, y = x - mean_x, y - mean_y
            variances = x.square().mean(dim=(2, 3)) + y.square().mean(dim=(2, 3))
            covariance = (x * y).mean(dim=(2, 3))
            mean_x, mean_y = mean_x.flatten(1), mean_y.flatten(1)
            texture = (2 * mean_x * mean_y + _STABLE) / (mean_x**2 + mean_y**2 + _STABLE)
            structure = (2 * covariance + _STABLE) / (variances + _STABLE)
            unlike.append(torch.stack([1 - texture, 1 - structure], dim=1))
        weights = torch.cat([self.get_buffer("alpha"), self.get_buffer("beta")]).flatten(1)
        return (torch.cat(unlike, dim=2) * weights).sum(dim=(1, 2)) / weights.sum()

    @torch.no_grad()
    def distance(self, restored: NDArray[np.uint8], original: NDArray[np.uint8]) -> float:
        """The distance of two uint8 (H, W, 3) RGB pictures."""
        return float(self(self._batch(restored), self._batch(original)))

    def _batch(self, rgb: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(rgb)).to(self.mean.device)
        return pixels.permute(2, 0, 1)[None].float() / 255

    def _features(self, batch: Tensor) -> Iterator[Tensor]:
        """The pictures (N, 3, H, W), then the ReLU of every tap."""
        yield batch
        features = (batch - self.mean) / self.deviation
        for index in range(CONVOLUTIONS):
            if index in POOL_BEFORE:
                features = l2_pool(features)
            kernel, bias = (self.get_buffer(f"conv{index}_{kind}") for kind in ("weight", "bias"))
            features = F.conv2d(features, kernel, bias, padding=1).relu()
            if index in TAPS:
                yield features


def l2_pool(features: Tensor) -> Tensor:
    """sqrt(g * x^2) at every second position, g the 3x3 Hann window of sum 1 (equation 5).

    (N, C, H, W) to (N, C, ceil(H/2), ceil(W/2)); outside are zeros.
    """
    hann = torch.hann_window(5, periodic=False, dtype=features.dtype, device=features.device)[1:-1]
    window = torch.outer(hann, hann) / hann.sum() ** 2
    kernel = window.expand(features.shape[1], 1, 3, 3)
    squares = F.conv2d(features**2, kernel, stride=2, padding=1, groups=features.shape[1])
    return (squares + 1e-12).sqrt()


def find_weights(path: str | Path | None = None) -> Path | None:
    """The file `dists.safetensors`, or None when there is none to be had.

    Looked for at `path` (the file itself, or its folder), else in the folder that the environment
    variable `TEASR_DISTS` names. A caller that gets None reports the metric as missing.

    Raises:
        UsageError: when `path` is given and holds no such file.
    """
    return find_file("dists.safetensors", path, "TEASR_DISTS", "DISTS")


def _check(weights: Mapping[str, Tensor], source: str) -> None:
    expected = [f"conv{i}.{kind}" for i in range(CONVOLUTIONS) for kind in ("weight", "bias")]
    expected += ["alpha", "beta"]
    check_names(weights, expected, "DISTS weights", source)
    channels, total = 3, 3
    for index in range(CONVOLUTIONS):
        kernel = weights[f"conv{index}.weight"]
        _check_shape(kernel, f"conv{index}.weight", (kernel.shape[0], channels, 3, 3), source)
        channels = kernel.shape[0]
        _check_shape(weights[f"conv{index}.bias"], f"conv{index}.bias", (channels,), source)
        total += channels if index in TAPS else 0
    for name in ("alpha", "beta"):
        _check_shape(weights[name], name, (1, total, 1, 1), source)


def _check_shape(tensor: Tensor, name: str, expected: tuple[int, ...], source: str) -> None:
    if tuple(tensor.shape) != expected:
        raise TeasrError(f"{source}: {name} has shape {tuple(tensor.shape)}; {expected} expected.")
