"""The peak of this process's memory, measured on itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from teasr.machine import machine_name, peak_memory_mb, restart_peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts anew")
def test_the_peak_is_that_since_the_restart() -> None:
    restart_peak_memory(CPU)
    before = peak_memory_mb(CPU)
    np.ones(100_000_000, np.uint8)  # freed at once
    assert before + 80 < peak_memory_mb(CPU) < before + 140
    restart_peak_memory(CPU)
    assert peak_memory_mb(CPU) < before + 40


def test_a_machine_has_a_name() -> None:
    name, _, cores = machine_name(CPU).rpartition(", ")
    assert name and cores.endswith(" cores")
