"""`teasr doctor`: what is installed, reachable and compiled; what to do about what is not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from teasr import tracking
from teasr.backbones.folder import built_in_models, compute_dtype
from teasr.errors import TeasrError
from teasr.lpips import find_weights

LIBRARIES = ("ray", "torch", "deepspeed", "webdataset", "albumentations", "mlflow")
# Room for a small run: shards, checkpoints, artifacts.
ENOUGH_DISK = 5e9
ENOUGH_MEMORY = 6e9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `good` is None for what teasr works without."""

    name: str
    good: bool | None
    detail: str
    advice: str = ""


def examine(home: Path) -> list[Finding]:
    """Look at this machine."""
    return [
        _python(),
        *(_library(name) for name in LIBRARIES),
        _opencv(),
        _compiler(),
        _hardware(),
        _memory(),
        _disk(home),
        _store(home),
        _ray(),
        _weights(),
        _lpips(),
        _samples(),
    ]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), version)


def _library(name: str) -> Finding:
    try:
        return Finding(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", f"pip install {name}")


def _opencv() -> Finding:
    found = [
        name
        for name in ("opencv-python-headless", "opencv-python", "opencv-contrib-python")
        if importlib.util.find_spec("cv2") and _installed(name)
    ]
    if len(found) == 1:
        return Finding("opencv", True, f"{found[0]} {metadata.version(found[0])}")
    return Finding(
        "opencv",
        False,
        f"{len(found)} OpenCV packages are installed: {', '.join(found) or 'none'}",
        f"pip uninstall -y {' '.join(found)}; pip install opencv-python-headless",
    )


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler and shutil.which(
        "ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ):
        return Finding("C++ compiler", True, compiler)
    return Finding(
        "C++ compiler",
        None,
        "g++ or ninja is missing: DeepSpeed cannot compile its extensions",
        "Debian: apt-get install g++; and pip install ninja. CPU and GPU training work without.",
    )


def _hardware() -> Finding:
    kind = str(compute_dtype()).removeprefix("torch.")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("hardware", True, f"{', '.join(names)}; computes in {kind}")
    return Finding("hardware", True, f"no GPU, {os.cpu_count()} CPU cores; computes in {kind}")


def _memory() -> Finding:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    advice = "" if available > ENOUGH_MEMORY else "Close other programs, or set training.batch=4."
    return Finding(
        "memory",
        True if available > ENOUGH_MEMORY else None,
        f"{available / 1e9:.1f} GB free",
        advice,
    )


def _disk(home: Path) -> Finding:
    place = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    detail = f"{free / 1e9:.1f} GB free at {home}" + ("" if writable else ", which is not writable")
    good = writable and free > ENOUGH_DISK
    return Finding("disk", good, detail, "" if good else "Set TEASR_HOME to another folder.")


def _store(home: Path) -> Finding:
    try:
        client = tracking.connect(home)
    except TeasrError as error:
        return Finding("MLflow store", False, error.message, error.hint)
    return Finding("MLflow store", True, tracking.mask_credentials(client.tracking_uri))


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding("Ray cluster", True, "none named: each command starts its own")
    # A process of its own: a cluster that does not answer must not hang this one.
    script = "import ray; ray.init(logging_level='ERROR', log_to_driver=False); "
    script += "r = ray.cluster_resources(); print(r.get('CPU', 0), r.get('GPU', 0))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return Finding(
            "Ray cluster", False, f"nothing answers at {address}", "Start it, or unset RAY_ADDRESS."
        )
    cpus, gpus = done.stdout.split()[-2:]
    return Finding(
        "Ray cluster", True, f"{address}: {float(cpus):.0f} CPUs, {float(gpus):.0f} GPUs"
    )


def _weights() -> Finding:
    names = ", ".join(built_in_models())
    return Finding("built-in models", bool(names) or None, names or "none in this installation")


def _lpips() -> Finding:
    missing = [network for network in ("alex", "vgg") if find_weights(network) is None]
    if not missing:
        return Finding("LPIPS weights", True, os.environ["TEASR_LPIPS"])
    return Finding(
        "LPIPS weights",
        None,
        f"missing for {', '.join(missing)}: training goes without that term, LPIPS is not measured",
        "Set TEASR_LPIPS to a folder with lpips_alex.safetensors and lpips_vgg.safetensors.",
    )


def _samples() -> Finding:
    if importlib.util.find_spec("interior_photos"):
        return Finding("sample photographs", True, "installed")
    return Finding(
        "sample photographs",
        None,
        "not installed",
        "pip install 'teasr[samples]', or use --photos.",
    )
