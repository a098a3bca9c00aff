"""The peak of a process's memory, measured on itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teasr.machine import machine_name

CPU = torch.device("cpu")


MEASURE = """
import numpy, torch
from teasr.machine import peak_memory_mb, restart_peak_memory
cpu = torch.device("cpu")
restart_peak_memory(cpu)
print(peak_memory_mb(cpu))
numpy.ones(100_000_000, numpy.uint8)  # freed at once
print(peak_memory_mb(cpu))
restart_peak_memory(cpu)
print(peak_memory_mb(cpu))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts anew")
def test_the_peak_is_that_since_the_restart() -> None:
    """In a process of its own, which no other thread or test gives memory back in."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, check=True)
    before, peak, after = map(float, done.stdout.split())
    assert before + 80 < peak < before + 140
    assert after < before + 40


def test_a_machine_has_a_name() -> None:
    name, _, cores = machine_name(CPU).rpartition(", ")
    assert name and cores.endswith(" cores")
