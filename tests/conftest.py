"""What several tests share: a small Ray, and pictures that behave like photographs."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

if "PYTEST_XDIST_WORKER" in os.environ:  # each takes one core; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Commands under test are interrupted; whoever starts pytest in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of two CPUs for the whole run."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def photo() -> Callable[..., NDArray[np.uint8]]:
    """`photo(height, width, seed)`: smooth shapes and a little noise, uint8 (H, W, 3)."""

    def make(height: int = 96, width: int = 128, seed: int = 0) -> NDArray[np.uint8]:
        random = np.random.default_rng(seed)
        rows, columns = np.mgrid[0:height, 0:width]
        waves = random.uniform(0.02, 0.3, (3, 2))
        phases = random.uniform(0, 6, 3)
        channels = [
            np.sin(rows * wave[0] + columns * wave[1] + phase) for wave, phase in zip(waves, phases)
        ]
        smooth = 128 + 90 * np.stack(channels, axis=2)
        noisy = smooth + random.normal(0, 4, smooth.shape)
        return noisy.clip(0, 255).astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model whose last layer is still zero: it is bicubic."""
    from teasr.backbones import PRESETS, DualBranchDiT, save_model

    folder = tmp_path_factory.mktemp("untrained")
    network = DualBranchDiT(PRESETS["teasr-xs"])
    save_model(network, network.state_dict(), folder)
    return folder
