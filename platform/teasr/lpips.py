"""LPIPS v0.1, the learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924).

A fixed ImageNet network looks at both pictures; after five of its ReLUs the features of every
position are brought to unit length, and the squared differences are weighed per channel, summed and
averaged over positions:

    d(x, y) = sum_l mean_hw sum_c w_lc (x^_lhwc - y^_lhwc)^2

Weights come from a safetensors file with `conv{i}.weight`, `conv{i}.bias` and `lin{i}.weight`.
Where torchvision and its ImageNet weights are at hand, the `lin{i}.weight` alone will do.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from teasr.errors import TeasrError, UsageError

Network = Literal["alex", "vgg"]


@dataclass(frozen=True)
class _Layout:
    strides: tuple[int, ...]
    paddings: tuple[int, ...]
    pool: int  # kernel of the max-pool, stride 2
    pool_before: tuple[int, ...]
    taps: tuple[int, ...]  # convolutions whose ReLU is looked at
    smallest: int  # side from which the last feature map has a position


_LAYOUTS: dict[Network, _Layout] = {
    "alex": _Layout((4, 1, 1, 1, 1), (2, 2, 1, 1, 1), 3, (1, 2), (0, 1, 2, 3, 4), 31),
    "vgg": _Layout((1,) * 13, (1,) * 13, 2, (2, 4, 7, 10), (1, 3, 6, 9, 12), 16),
}


class Lpips(nn.Module):
    """The distance network, frozen; gradients flow to the pictures only.

    Args:
        weights: tensors by name; 13 convolutions make it VGG16, otherwise AlexNet.
        dtype: of the convolutions; the distance is always float32.
        source: named in errors.

    Raises:
        TeasrError: naming the tensors that are missing, unknown or of a wrong shape.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        source: str = "LPIPS weights",
    ) -> None:
        super().__init__()
        self.network: Network = (
            "vgg" if any(f"conv{i}.weight" in weights for i in range(5, 13)) else "alex"
        )
        self.layout = _LAYOUTS[self.network]
        _check(weights, self.layout, self.network, source)
        count = len(self.layout.strides)
        self.kernels = _frozen([weights[f"conv{i}.weight"] for i in range(count)], dtype)
        self.biases = _frozen([weights[f"conv{i}.bias"] for i in range(count)], dtype)
        self.heads = _frozen([weights[f"lin{i}.weight"] for i in range(5)], torch.float32)
        # ImageNet's mean and deviation in the range [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """From a safetensors file; AlexNet or VGG16 by the tensors in it.

        Raises:
            TeasrError: when the file cannot be read or does not hold the tensors.
            UsageError: when it holds the heads alone and torchvision has no convolutions.
        """
        weights = read_weights(path, "LPIPS")
        if set(weights) == {f"lin{i}.weight" for i in range(5)}:
            # The second tap has 192 channels in AlexNet, 128 in VGG16.
            network: Network = "alex" if weights["lin1.weight"].numel() == 192 else "vgg"
            weights |= convolutions(network)
        return cls(weights, dtype, str(path))

    @property
    def smallest(self) -> int:
        """Pixels that a picture needs a side."""
        return self.layout.smallest

    def forward(self, restored: Tensor, original: Tensor) -> Tensor:
        """Distances (N,), float32, 0 for equal pictures.

        Args:
            restored, original: (N, 3, H, W) in [-1, 1].

        Raises:
            ValueError: when the shapes differ, or a side is below 31 (AlexNet) or 16 (VGG16).
        """
        if restored.shape != original.shape or restored.ndim != 4 or restored.shape[1] != 3:
            raise ValueError(
                "two batches (N, 3, H, W) of one shape expected, "
                f"{tuple(restored.shape)} and {tuple(original.shape)} given"
            )
        if min(restored.shape[2:]) < self.layout.smallest:
            raise ValueError(
                f"LPIPS ({self.network}) needs {self.layout.smallest} pixels a side, "
                f"{restored.shape[2]} x {restored.shape[3]} given"
            )
        first, second = self._normalise(restored), self._normalise(original)
        distance = torch.zeros(len(restored), device=restored.device)
        heads = iter(self.heads)
        for index in range(len(self.kernels)):
            first, second = self._layer(index, first), self._layer(index, second)
            if index in self.layout.taps:
                difference = (_unit_length(first) - _unit_length(second)) ** 2
                distance = distance + F.conv2d(difference, next(heads)).mean(dim=(1, 2, 3))
        return distance

    @torch.no_grad()
    def distance(self, restored: NDArray[np.uint8], original: NDArray[np.uint8]) -> float:
        """The distance of two uint8 (H, W, 3) RGB pictures."""
        return float(self(self._batch(restored), self._batch(original)))

    def _batch(self, rgb: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(rgb)).to(self.shift.device)
        return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1

    def _normalise(self, batch: Tensor) -> Tensor:
        normalised = (batch.float() - self.shift) / self.scale
        return normalised.to(self.kernels[0].dtype, memory_format=torch.channels_last)

    def _layer(self, index: int, features: Tensor) -> Tensor:
        layout = self.layout
        if index in layout.pool_before:
            features = F.max_pool2d(features, layout.pool, stride=2)
        kernel, bias = self.kernels[index], self.biases[index]
        return F.conv2d(
            features, kernel, bias, layout.strides[index], layout.paddings[index]
        ).relu()


def find_weights(network: Network, path: str | Path | None = None) -> Path | None:
    """The file `lpips_{network}.safetensors`, or None when there is none to be had.

    Looked for at `path` (the file itself, or its folder), else in the folder that the environment
    variable `TEASR_LPIPS` names. A caller that gets None reports the metric as missing.

    Raises:
        UsageError: when `path` is given and holds no such file.
    """
    return find_file(f"lpips_{network}.safetensors", path, "TEASR_LPIPS", "LPIPS")


def find_file(name: str, path: str | Path | None, variable: str, metric: str) -> Path | None:
    """The weights file `name` of `metric` at `path`, else in the folder that `variable` names.

    Raises:
        UsageError: when `path` is given and holds no such file.
    """
    if path is not None:
        given = Path(path)
        found = given / name if given.is_dir() else given
        if not found.is_file():
            raise UsageError(
                f"No {metric} weights at {found}.",
                f"Give the file or the folder that holds {name}.",
            )
        return found
    folder = os.environ.get(variable)
    if folder and (Path(folder) / name).is_file():
        return Path(folder) / name
    return None


def read_weights(path: str | Path, metric: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        TeasrError: when the file cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TeasrError(f"Cannot read {metric} weights from {path}: {error}.") from None


def convolutions(network: Network, torchvision: ModuleType | None = None) -> dict[str, Tensor]:
    """`conv{i}.weight` and `conv{i}.bias` of torchvision's ImageNet network, from its cache.

    Nothing is downloaded, and its file is read as tensors alone.

    Args:
        torchvision: the module; None imports it.

    Raises:
        UsageError: when torchvision is not installed or has not cached the weights.
    """
    model, weights = {"alex": ("alexnet", "AlexNet"), "vgg": ("vgg16", "VGG16")}[network]
    try:
        models = (torchvision or importlib.import_module("torchvision")).models
    except ImportError:
        raise UsageError(
            f"The weights lack {weights}'s convolutions, and torchvision, which has them, is not "
            "installed.",
            "Give a file that holds conv{i}.weight and conv{i}.bias, or: pip install torchvision",
        ) from None
    address: str = getattr(models, f"{weights}_Weights").IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir(), "checkpoints", address.rpartition("/")[2])
    if not file.is_file():
        raise UsageError(
            f"The weights lack {weights}'s convolutions, and torchvision has none at {file}.",
            'Once, with a network: python -c "import torchvision; '
            f"torchvision.models.{model}(weights='IMAGENET1K_V1')\"",
        )
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # the layout alone: no second set of weights is made
        features = getattr(models, model)().features
    found = [name for name, layer in features.named_children() if isinstance(layer, nn.Conv2d)]
    return {
        f"conv{index}.{kind}": tensors[f"features.{name}.{kind}"]
        for index, name in enumerate(found)
        for kind in ("weight", "bias")
    }


def _frozen(tensors: list[Tensor], dtype: torch.dtype) -> nn.ParameterList:
    return nn.ParameterList(
        nn.Parameter(
            tensor.to(dtype).contiguous(memory_format=torch.channels_last)
            if tensor.ndim == 4
            else tensor.to(dtype),
            requires_grad=False,
        )
        for tensor in tensors
    )


def _unit_length(features: Tensor) -> Tensor:
    """Each position of (N, C, H, W) divided by its length; float32, where 1e-10 is not zero.

    `vector_norm` has gradient 0 at 0; a root of squares gives NaN where every ReLU is off, which
    the ReLU stops but anomaly detection reports.
    """
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def check_names(
    weights: Mapping[str, Tensor], expected: Sequence[str], what: str, source: str
) -> None:
    """Refuse tensors other than the `expected` ones.

    Args:
        what, source: named in the error: what the tensors are not, and where they are from.

    Raises:
        TeasrError: naming the tensors that are missing or unknown.
    """
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    if missing or unknown:
        problems = [f"{', '.join(missing)} missing"] if missing else []
        problems += [f"{', '.join(unknown)} unknown"] if unknown else []
        raise TeasrError(f"{source}: not {what}: {'; '.join(problems)}.")


def _check(weights: Mapping[str, Tensor], layout: _Layout, network: Network, source: str) -> None:
    count = len(layout.strides)
    expected = [f"conv{i}.{kind}" for i in range(count) for kind in ("weight", "bias")]
    expected += [f"lin{i}.weight" for i in range(5)]
    check_names(weights, expected, f"LPIPS weights ({network})", source)
    channels, taps = 3, iter(range(5))
    for index in range(count):
        kernel, name = weights[f"conv{index}.weight"], f"conv{index}"
        if kernel.ndim != 4 or kernel.shape[1] != channels:
            raise TeasrError(
                f"{source}: {name}.weight has shape {tuple(kernel.shape)}; "
                f"(*, {channels}, k, k) expected."
            )
        channels = kernel.shape[0]
        shapes: dict[str, tuple[int, ...]] = {f"{name}.bias": (channels,)}
        if index in layout.taps:
            shapes[f"lin{next(taps)}.weight"] = (1, channels, 1, 1)
        for other, shape in shapes.items():
            if tuple(weights[other].shape) != shape:
                raise TeasrError(
                    f"{source}: {other} has shape {tuple(weights[other].shape)}; {shape} expected."
                )
