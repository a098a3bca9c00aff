"""BasicSR 1.4.2, the published Real-ESRGAN degradation, as a reference for tests and benchmarks.

    from tests.reference import basicsr

    reference = basicsr.load()                        # raises UnavailableError without a network
    lr = reference.degrade(hr, pair.recipe["steps"])  # our recipe, its operators

`import basicsr` needs a torchvision of years ago, so the three modules that hold the operators are
loaded one by one from the source distribution. pip fetches that, against the hash in
`requirements.txt`, into the folder `TEASR_BASICSR` or pytest's cache; a copy laid there by hand
serves a machine without a network. Nothing of it is installed or kept in the repository. The metric
NIQE comes the same way (`load_niqe`).
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from teasr.degradation import Step

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
ARCHIVE = "basicsr-1.4.2.tar.gz"
KERNEL_SIZE = 21  # the reference pads every kernel to this
SCALE = 4  # between ground truth and LR
SIZES = range(7, 22, 2)
MODES = ("area", "bilinear", "bicubic")
KERNELS = {
    "iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03,
    "plateau_iso": 0.12, "plateau_aniso": 0.03,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What a published option file says of one stage, under its names."""

    blur_prob: float
    blur_sigma: tuple[float, float]
    resize_prob: tuple[float, float, float]
    resize_range: tuple[float, float]
    noise_range: tuple[float, float]
    poisson_scale_range: tuple[float, float]
    jpeg_range: tuple[float, float]


# Both stages of each preset. What no option file changes is in `BasicSR.random_degrade`.
OPTIONS: Mapping[str, tuple[Stage, Stage]] = {
    "realesrgan": (
        Stage(1.0, (0.2, 3), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3), (30, 95)),
        Stage(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95)),
    ),
    "teasr": (
        Stage(1.0, (0.2, 3), (0.2, 0.7, 0.1), (0.3, 1.5), (1, 15), (0.05, 2), (60, 95)),
        Stage(0.5, (0.2, 1.5), (0.3, 0.4, 0.3), (0.6, 1.2), (1, 12), (0.05, 1), (60, 100)),
    ),
}


class UnavailableError(RuntimeError):
    """The source distribution is neither at hand nor can it be fetched."""


def folder() -> Path:
    """Where the source distribution is kept: `TEASR_BASICSR`, or pytest's cache."""
    return Path(os.environ.get("TEASR_BASICSR") or ROOT / ".pytest_cache" / "d" / "basicsr")


def fetch(folder: Path) -> Path:
    """The source distribution in `folder`, fetched when it is not there.

    Raises:
        UnavailableError: when pip cannot get it.
        ValueError: when the file is not the one that `requirements.txt` names.
    """
    archive = folder / ARCHIVE
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            _download(aside)
            # Renamed: another process that tests never sees a part of it.
            (Path(aside) / ARCHIVE).rename(archive)
    expected = re.search(r"--hash=sha256:([0-9a-f]{64})", REQUIREMENTS.read_text())
    assert expected is not None
    if hashlib.sha256(archive.read_bytes()).hexdigest() != expected[1]:
        raise ValueError(f"{archive} is not the file that {REQUIREMENTS.name} names; delete it.")
    return archive


def _download(folder: str) -> None:
    command = [
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet",
        "--retries", "1", "--timeout", "15", "--no-deps", "--no-binary", ":all:",
        "--no-build-isolation", "--require-hashes", "-r", str(REQUIREMENTS), "-d", folder,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"pip did not fetch {ARCHIVE} within two minutes.") from None
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise ValueError(done.stderr)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"pip cannot fetch {ARCHIVE}: {reason}")


def load() -> BasicSR:
    """The reference.

    Raises:
        UnavailableError: when pip cannot get it.
        ValueError: when the file is not the one that `requirements.txt` names.
    """
    with tarfile.open(fetch(folder())) as archive:
        return BasicSR(
            degradations=_module(archive, "data/degradations.py"),
            diffjpeg=_module(archive, "utils/diffjpeg.py"),
            img_process_util=_module(archive, "utils/img_process_util.py"),
        )


def load_niqe(unpacked: Path) -> ModuleType:
    """`basicsr.metrics.niqe`, with its parameters unpacked into the folder `unpacked`.

    Raises:
        UnavailableError: when pip cannot get it.
        ValueError: when the file is not the one that `requirements.txt` names.
    """
    import scipy.ndimage

    filters = ModuleType("scipy.ndimage.filters")  # gone from SciPy's later releases
    filters.convolve = scipy.ndimage.convolve  # type: ignore[attr-defined]
    with tarfile.open(fetch(folder())) as archive:
        colours = _module(archive, "utils/color_util.py")
        modules = {
            filters.__name__: filters,
            "basicsr": ModuleType("basicsr"),
            "basicsr.utils": colours,
            "basicsr.utils.matlab_functions": _module(archive, "utils/matlab_functions.py"),
            "basicsr.utils.registry": _module(archive, "utils/registry.py"),
        }
        with mock.patch.dict(sys.modules, modules):
            util = _module(archive, "metrics/metric_util.py")
            sys.modules["basicsr.metrics.metric_util"] = util
            module = _module(archive, "metrics/niqe.py")
        name = "metrics/niqe_pris_params.npz"
        (unpacked / Path(name).name).write_bytes(_read(archive, name))
    module.__file__ = str(unpacked / "niqe.py")  # it looks for its parameters beside itself
    return module


def _read(archive: tarfile.TarFile, path: str) -> bytes:
    file = archive.extractfile(f"{ARCHIVE.removesuffix('.tar.gz')}/basicsr/{path}")
    assert file is not None
    return file.read()


def _module(archive: tarfile.TarFile, path: str) -> ModuleType:
    """The module at `path` of the package, run from the archive."""
    module = ModuleType(f"reference_{Path(path).stem}")
    gone = ModuleType("torchvision.transforms.functional_tensor")
    gone.rgb_to_grayscale = _rgb_to_grayscale  # type: ignore[attr-defined]
    # On import it sets NumPy's error handling for the whole process: `errstate` takes that back.
    with mock.patch.dict(sys.modules, {gone.__name__: gone}), np.errstate():
        exec(compile(_read(archive, path), path, "exec"), vars(module))
    return module


def _rgb_to_grayscale(image: torch.Tensor, num_output_channels: int = 1) -> torch.Tensor:
    """What torchvision has under this name, for (..., 3, H, W)."""
    assert num_output_channels == 1
    red, green, blue = image.unbind(dim=-3)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(dim=-3)


def to_tensor(image: NDArray[Any]) -> torch.Tensor:
    """`(H, W, 3)` uint8 or float32 in [0, 1] as `(1, 3, H, W)` float32 in [0, 1]."""
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    return planes.float() / 255 if image.dtype == np.uint8 else planes


def to_array(image: torch.Tensor) -> NDArray[np.float32]:
    """The inverse of `to_tensor`, for float32."""
    return np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())


def to_bytes(image: torch.Tensor) -> NDArray[np.uint8]:
    """Clamp and round as the reference does: `(1, 3, H, W)` in [0, 1] to `(H, W, 3)` uint8."""
    levels = torch.clamp((image * 255.0).round(), 0, 255)
    return np.ascontiguousarray(levels[0].permute(1, 2, 0).to(torch.uint8).numpy())


class BasicSR:
    """The reference's operators, on `(1, 3, H, W)` float32 RGB in [0, 1], on the CPU.

    Attributes:
        degradations: `basicsr.data.degradations`.
        diffjpeg: `basicsr.utils.diffjpeg`.
        img_process_util: `basicsr.utils.img_process_util`.
    """

    def __init__(
        self, degradations: ModuleType, diffjpeg: ModuleType, img_process_util: ModuleType
    ) -> None:
        self.degradations = degradations
        self.diffjpeg = diffjpeg
        self.img_process_util = img_process_util
        self._jpeg = diffjpeg.DiffJPEG(differentiable=False)

    def kernel(self, shape: str, size: int, **numbers: float) -> NDArray[np.float64]:
        """The kernel of a blur step, `(size, size)`."""
        module = self.degradations
        if shape == "sinc":
            with np.errstate(invalid="ignore"):  # 0 / 0 at the centre, which it sets afterwards
                return module.circular_lowpass_kernel(numbers["cutoff"], size)
        isotropic = "anisotropic" not in shape
        axes = numbers["sigma_x"], numbers["sigma_y"], numbers["rotation"]
        if shape.startswith("generalized"):
            return module.bivariate_generalized_Gaussian(
                size, *axes, numbers["beta"], isotropic=isotropic
            )
        if shape.startswith("plateau"):
            return module.bivariate_plateau(size, *axes, numbers["beta"], isotropic=isotropic)
        return module.bivariate_Gaussian(size, *axes, isotropic=isotropic)

    def filter(self, image: torch.Tensor, kernel: NDArray[np.float64]) -> torch.Tensor:
        """`filter2D` with `kernel` padded to 21 x 21."""
        padded = np.pad(kernel, max(0, KERNEL_SIZE - len(kernel)) // 2)
        return self.img_process_util.filter2D(image, torch.FloatTensor(padded)[None])

    def blur(self, image: torch.Tensor, shape: str, size: int, **numbers: float) -> torch.Tensor:
        return self.filter(image, self.kernel(shape, size, **numbers))

    def resize(self, image: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
        return functional.interpolate(image, size=(height, width), mode=mode)

    def gaussian_noise(
        self, image: torch.Tensor, sigma: float, grey: bool, seed: int
    ) -> torch.Tensor:
        torch.manual_seed(seed)
        return self.degradations.add_gaussian_noise_pt(image, sigma, float(grey))

    def poisson_noise(
        self, image: torch.Tensor, scale: float, grey: bool, seed: int
    ) -> torch.Tensor:
        torch.manual_seed(seed)
        return self.degradations.add_poisson_noise_pt(image, scale, gray_noise=float(grey))

    def jpeg(self, image: torch.Tensor, quality: float) -> torch.Tensor:
        # At 100 its tables are 0 and the picture NaN; the reference draws a real number below.
        quality = float(min(quality, 99.9))
        return self._jpeg(torch.clamp(image, 0, 1), quality=torch.tensor([float(quality)]))

    def unsharp_mask(
        self, image: torch.Tensor, radius: int = 50, amount: float = 0.5, threshold: float = 10.0
    ) -> torch.Tensor:
        return self.img_process_util.USMSharp(radius)(image, amount, threshold)

    @torch.no_grad()
    def degrade(
        self, hr: NDArray[np.uint8], steps: Iterable[Step | Mapping[str, Any]]
    ) -> NDArray[np.uint8]:
        """The LR picture of `hr`, `(H, W, 3)` uint8 RGB, by our `steps` and its operators.

        Noise is drawn by torch, so it is another field of the same strength. Reflected borders want
        more than 10 pixels a side wherever a step blurs.
        """
        image = to_tensor(hr)
        for step in steps:
            if not isinstance(step, Step):
                step = Step.from_dict(step)
            image = getattr(self, step.operator)(image, **step.params)
        return to_bytes(image)

    @torch.no_grad()
    def random_degrade(self, hr: NDArray[np.uint8], preset: str, seed: int) -> NDArray[np.uint8]:
        """The LR picture of `hr` with everything drawn by the reference's own generators.

        Kernels are drawn as its data set draws them, the rest as its model does for a batch of one.
        All three of its generators (Python's, NumPy's and torch's global ones) start from `seed`.
        The ground truth is not sharpened, as in our presets; Real-ESRGAN's is.

        Args:
            hr: ground truth, `(H, W, 3)` uint8 RGB.
            preset: key of `OPTIONS`.
            seed: seed of the generators.
        """
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        first, second = OPTIONS[preset]
        height, width = hr.shape[0] // SCALE, hr.shape[1] // SCALE
        image = self.filter(to_tensor(hr), self._random_kernel(first))
        factor = _random_factor(first)
        # A factor here, a size everywhere else: so its own model does.
        image = functional.interpolate(image, scale_factor=factor, mode=random.choice(MODES))
        image = self._random_noise(image, first)
        image = self.jpeg(image, np.random.uniform(*first.jpeg_range))
        if np.random.uniform() < second.blur_prob:
            image = self.filter(image, self._random_kernel(second))
        factor = _random_factor(second)
        image = self.resize(image, int(height * factor), int(width * factor), random.choice(MODES))
        image = self._random_noise(image, second)
        resize_first = np.random.uniform() < 0.5
        if not resize_first:
            image = self.jpeg(image, np.random.uniform(*second.jpeg_range))
        image = self.resize(image, height, width, random.choice(MODES))
        if np.random.uniform() < 0.8:
            size = random.choice(SIZES)
            image = self.blur(image, "sinc", size, cutoff=np.random.uniform(np.pi / 3, np.pi))
        if resize_first:
            image = self.jpeg(image, np.random.uniform(*second.jpeg_range))
        return to_bytes(image)

    def _random_kernel(self, stage: Stage) -> NDArray[np.float64]:
        size = random.choice(SIZES)
        if np.random.uniform() < 0.1:
            cutoff = np.random.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi)
            return self.kernel("sinc", size, cutoff=cutoff)
        return self.degradations.random_mixed_kernels(
            list(KERNELS),
            list(KERNELS.values()),
            size,
            stage.blur_sigma,
            stage.blur_sigma,
            [-math.pi, math.pi],
            betag_range=(0.5, 4),
            betap_range=(1, 2),
        )

    def _random_noise(self, image: torch.Tensor, stage: Stage) -> torch.Tensor:
        if np.random.uniform() < 0.5:
            return self.degradations.random_add_gaussian_noise_pt(
                image, stage.noise_range, gray_prob=0.4
            )
        return self.degradations.random_add_poisson_noise_pt(
            image, stage.poisson_scale_range, gray_prob=0.4
        )


def _random_factor(stage: Stage) -> float:
    low, high = stage.resize_range
    direction = random.choices(["up", "down", "keep"], stage.resize_prob)[0]
    if direction == "keep":
        return 1
    return np.random.uniform(*((1, high) if direction == "up" else (low, 1)))
