"""Are the pictures that come in like those that a model learned from?

Every picture is described by a few figures, never kept. How it looks is measured on one window of
128 pixels a side, so that pictures of all sizes compare; where it lies follows from the picture's
bytes. What came in (`InputRecorder`, a bounded file of JSON lines) is compared, figure by figure,
with the low-resolution pictures of the training (`Reference`): by the two-sample Kolmogorov-Smirnov
test, which says whether a difference is more than chance, and by the population stability index,
which says whether it is large enough to matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import Field

from teasr.config import Settings
from teasr.errors import TeasrError, UsageError
from teasr.hygiene import sharpness
from teasr.images import BadPicture, Bytes, jpeg_quality

WINDOW = 128
"""Side, pixels, of the window that a picture's looks are measured on."""
REFERENCE_FILE = "inputs.json"
"""Artifact of a training run: the `Reference` of its model."""

COMPARED = {
    "noise": "noise, grey levels",
    "sharpness": "sharpness, 0 to 1",
    "brightness": "brightness, grey levels",
    "contrast": "contrast, grey levels",
    "jpeg_quality": "JPEG quality",
}
"""Figures that tell of drift, and what they are."""
SIZES = {"width": "width, pixels", "height": "height, pixels", "megapixels": "megapixels"}
"""Figures that are shown and not compared: a restoration takes any size."""

_MASK = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
_BINS = 10
_TURN_BYTES = 4 << 20


class DriftSettings(Settings):
    """When a difference counts as drift: both limits must be passed."""

    significance: float = Field(0.01, gt=0, lt=1)
    """Chance of a false alarm, over all figures together, when nothing has changed."""
    stability: float = Field(0.25, ge=0)
    """Population stability index above which a difference matters; by custom below 0.1 is none and
    above 0.25 a large one."""
    pictures: int = Field(50, ge=10)
    """Fewest pictures that are compared."""


@dataclass(frozen=True)
class Reference:
    """Figures of the pictures that a model learned from.

    Attributes:
        figures: by name of `COMPARED` or `SIZES`, one value per picture.
        about: what these pictures are, for people.
    """

    figures: Mapping[str, Sequence[float]]
    about: str

    def to_json(self) -> str:
        """Everything, readable back by `from_json`."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Reference:
        """The inverse of `to_json`.

        Raises:
            TeasrError: when the text is not a reference.
        """
        try:
            document: dict[str, Any] = json.loads(text)
            figures = {name: [*map(float, of)] for name, of in document["figures"].items()}
            return cls(figures, str(document["about"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TeasrError("This is not a drift reference written by teasr.") from None


@dataclass(frozen=True)
class Difference:
    """One figure of two sets of pictures.

    Attributes:
        figure: its name.
        pictures: of the inputs that have it; a PNG has no JPEG quality.
        median, reference_median: of the inputs, of the reference.
        distance: Kolmogorov-Smirnov, 0 to 1; None for what is not compared.
        chance: of a distance as large when both are of one distribution.
        stability: population stability index.
        outside: share of the inputs beyond the central 99% of the reference.
        drifted: whether both limits are passed.
    """

    figure: str
    pictures: int
    median: float
    reference_median: float
    distance: float | None = None
    chance: float | None = None
    stability: float | None = None
    outside: float | None = None
    drifted: bool = False


# ---------------------------------------------------------------- figures of a picture


def describe(encoded: bytes, rgb: Bytes) -> dict[str, float]:
    """All figures of a picture that came as `encoded` and is `rgb`, uint8 (H, W, 3)."""
    height, width = rgb.shape[:2]
    seed = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")
    random = np.random.default_rng(seed)
    top, left = (int(random.integers(max(side - WINDOW, 0) + 1)) for side in (height, width))
    figures = sizes(width, height) | looks(rgb[top : top + WINDOW, left : left + WINDOW])
    try:
        quality = jpeg_quality(encoded)
    except BadPicture:  # an odd header, which the decoder took nevertheless
        quality = None
    return figures if quality is None else figures | {"jpeg_quality": float(quality)}


def sizes(width: int, height: int) -> dict[str, float]:
    """The figures of `SIZES`."""
    return {
        "width": float(width),
        "height": float(height),
        "megapixels": round(width * height / 1e6, 4),
    }


def looks(window: Bytes) -> dict[str, float]:
    """How `window`, uint8 (H, W, 3), looks: the figures of `COMPARED` that its pixels have."""
    grey = cv2.cvtColor(np.ascontiguousarray(window), cv2.COLOR_RGB2GRAY).astype(np.uint8)
    return {
        "noise": round(noise(grey), 3),
        "sharpness": round(sharpness(grey), 4),
        "brightness": round(float(grey.mean()), 2),
        "contrast": round(float(grey.std()), 2),
    }


def noise(grey: Bytes) -> float:
    """Standard deviation, grey levels, of white noise in `grey`, uint8 (H, W).

    J. Immerkaer's mask ("Fast noise variance estimation", 1996), which takes out constant and
    linear parts, with the median in place of his mean, so that edges and texture in less than half
    of the pixels hardly count (D. Donoho and I. Johnstone, "Ideal spatial adaptation by wavelet
    shrinkage", 1994). The mask makes noise 6 times as strong; of a normal variable the median of
    the absolute value is 0.6745 deviations. The noise of rounding, 0.29, counts. 0 for less than 3
    pixels a side.
    """
    if min(grey.shape) < 3:
        return 0.0
    response = cv2.filter2D(grey.astype(np.float32), -1, _MASK)[1:-1, 1:-1]
    magnitude = np.abs(response).astype(np.int64).ravel()
    # Whole numbers stand for all that is rounded to them, or the median would jump.
    counts = np.bincount(magnitude)
    below = np.concatenate(([0], np.cumsum(counts)))
    half = len(magnitude) / 2
    at = int(np.searchsorted(below, half, "right")) - 1
    low, width = (at - 0.5, 1.0) if at else (0.0, 0.5)
    median = low + width * (half - below[at]) / counts[at]
    return float(median / (6 * 0.6745))


# ---------------------------------------------------------------- what came in


def inputs_file(home: Path, name: str) -> Path:
    """Where the inputs of the model `name` are recorded in `home`."""
    return home / "inputs" / f"{name}.jsonl"


class InputRecorder:
    """Appends a line per picture to a file of JSON lines; safe from many threads and processes.

    At `turn_bytes` the file becomes `PATH.1`, in place of the one before: twice that, about 40,000
    pictures, is the most that is kept. The pictures themselves are kept only when asked for.

    Args:
        path: the file; its folder is made.
        keep_pictures: how many of the newest pictures are kept, as they came, in a folder beside
            the file, named by their SHA-256.
    """

    def __init__(self, path: Path, keep_pictures: int = 0, turn_bytes: int = _TURN_BYTES) -> None:
        self._path = path.absolute()
        self._pictures = self._path.with_suffix(".pictures")
        self._keep, self._turn_bytes = keep_pictures, turn_bytes
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{self._path}.lock")  # each thread has a handle of its own

    def add(self, encoded: bytes, rgb: Bytes) -> None:
        """Note a picture that came as `encoded` and is `rgb`, uint8 (H, W, 3).

        Raises:
            OSError: when the file cannot be written.
        """
        at = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"at": at, **describe(encoded, rgb)}) + "\n"
        with self._lock:
            if self._path.exists() and self._path.stat().st_size + len(line) > self._turn_bytes:
                self._path.replace(_turned(self._path))
            with self._path.open("a") as file:
                file.write(line)
            if self._keep:
                self._keep_picture(encoded)

    def _keep_picture(self, encoded: bytes) -> None:
        self._pictures.mkdir(exist_ok=True)
        (self._pictures / hashlib.sha256(encoded).hexdigest()).write_bytes(encoded)
        kept = sorted(self._pictures.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for old in kept[: -self._keep]:
            old.unlink(missing_ok=True)


@dataclass(frozen=True)
class Inputs:
    """Pictures that came in.

    Attributes:
        figures: by name, a value per picture that has it.
        pictures: how many.
        first, last: when they came, UTC; None for no pictures.
    """

    figures: Mapping[str, Sequence[float]]
    pictures: int
    first: datetime | None = None
    last: datetime | None = None


def read_inputs(path: Path, since: datetime | None = None) -> Inputs:
    """What was recorded at `path` since then. A line that was cut off is passed over.

    Raises:
        UsageError: when nothing was recorded there.
    """
    files = [file for file in (_turned(path), path) if file.is_file()]
    if not files:
        raise UsageError(
            f"There are no recorded inputs at {path}.",
            "Record some (teasr serve --record-inputs), or name another file with --inputs.",
        )
    figures: dict[str, list[float]] = {}
    times: list[datetime] = []
    for line in (line for file in files for line in file.read_text(errors="replace").splitlines()):
        try:
            document = json.loads(line)
            at = datetime.fromisoformat(document.pop("at"))
            values = {name: float(document[name]) for name in document}
            if since is not None and at < since:
                continue
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        times.append(at)
        for name, value in values.items():
            figures.setdefault(name, []).append(value)
    ends = (min(times), max(times)) if times else (None, None)
    return Inputs(figures, len(times), *ends)


def _turned(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


# ---------------------------------------------------------------- the comparison


def compare(
    reference: Reference, inputs: Inputs, settings: DriftSettings | None = None
) -> list[Difference]:
    """Figure by figure, those of `COMPARED` first. A figure that too few pictures have on either
    side is left out.

    Raises:
        UsageError: when there are too few pictures to compare at all.
    """
    settings = settings or DriftSettings()
    if inputs.pictures < settings.pictures:
        raise UsageError(
            f"{inputs.pictures} pictures are too few to compare: {settings.pictures} are needed.",
            "Wait for more, or look further back with --since.",
        )
    compared = list(_shared(COMPARED, reference, inputs, settings.pictures))
    # Bonferroni: all figures together give a false alarm no more often than was asked for.
    limit = settings.significance / max(len(compared), 1)
    found = []
    for name, theirs, ours in compared:
        from scipy.stats import ks_2samp

        test = ks_2samp(theirs, ours, method="asymp")
        index = stability_index(theirs, ours)
        low, high = np.quantile(theirs, (0.005, 0.995))
        found.append(
            Difference(
                figure=name,
                pictures=len(ours),
                median=float(np.median(ours)),
                reference_median=float(np.median(theirs)),
                distance=float(test.statistic),
                chance=float(test.pvalue),
                stability=index,
                outside=float(((ours < low) | (ours > high)).mean()),
                drifted=bool(test.pvalue < limit and index > settings.stability),
            )
        )
    for name, theirs, ours in _shared(SIZES, reference, inputs, 1):
        medians = float(np.median(ours)), float(np.median(theirs))
        found.append(Difference(name, len(ours), *medians))
    return found


def stability_index(reference: NDArray[np.float64], current: NDArray[np.float64]) -> float:
    """Population stability index of two samples, 0 for equal ones.

    The sum of (p - q) ln(p / q) over the tenths of the reference, with half a picture more in each
    so that an empty one gives no infinity (B. Yurdakul, "Statistical properties of population
    stability index", 2018).
    """
    inner = np.unique(np.quantile(reference, np.linspace(0, 1, _BINS + 1)[1:-1]))

    def shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
        counts = np.bincount(np.searchsorted(inner, values, "left"), minlength=len(inner) + 1)
        share: NDArray[np.float64] = (counts + 0.5) / (counts + 0.5).sum()
        return share

    p, q = shares(current), shares(reference)
    return float(((p - q) * np.log(p / q)).sum())


def _shared(
    names: Iterable[str], reference: Reference, inputs: Inputs, least: int
) -> Iterable[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    for name in names:
        theirs, ours = (np.array(of.figures.get(name, ()), float) for of in (reference, inputs))
        if len(theirs) >= least and len(ours) >= least:
            yield name, theirs, ours
