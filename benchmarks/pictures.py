"""Pictures to measure on: no photograph is needed, and everybody has the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """`(height, width, 3)` uint8 with the spectrum of photographs (1/f noise)."""
    random = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(random.normal(size=(height, width, 3)), axes=(0, 1))
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    spectrum /= np.maximum(np.hypot(rows, columns), 1 / height)[..., None]
    values = np.fft.irfft2(spectrum, (height, width), axes=(0, 1))
    return (128 + 55 * values / values.std()).clip(0, 255).astype(np.uint8)
