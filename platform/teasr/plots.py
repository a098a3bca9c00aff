"""Small plots as SVG: what was drawn, against what should have been; one quantity over another;
distributions over each other; two systems' figures of the same things.

No library: an SVG of bars or curves is a few lines, scales, and goes into a page as text or into a
file of its own (`document`). Colours are CSS classes (`PLOT_CSS`), so that a page may have a dark
side.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 300, 120
"""Size of a histogram in SVG user units."""

PLOT_CSS = """
svg.plot { width: 100%; height: auto; display: block; font: 10px system-ui, sans-serif; }
svg.plot .bar { fill: var(--bar, #8fb3d9); }
svg.plot .bar:hover { fill: var(--bar-hover, #5f8fc4); }
svg.plot .band { fill: var(--mark, #c2410c); opacity: .16; }
svg.plot .line { fill: none; stroke: var(--mark, #c2410c); stroke-width: 1.5; }
svg.plot .axis { stroke: var(--faint, #8a8a8a); stroke-width: 1; }
svg.plot text { fill: var(--ink, #333); }
svg.plot text.count { fill: var(--faint, #777); }
svg.plot .curve { fill: none; stroke: currentColor; stroke-width: 1.5; }
svg.plot .area { fill: currentColor; opacity: .16; }
svg.plot .dot { fill: currentColor; }
svg.plot .diagonal { stroke: var(--faint, #8a8a8a); stroke-dasharray: 4 3; }
svg.plot .side { fill: currentColor; }
svg.plot .spread .dot { opacity: .75; }
svg.plot .hue0 { color: var(--hue0, #c2410c); }
svg.plot .hue1 { color: var(--hue1, #2563a8); }
svg.plot .hue2 { color: var(--hue2, #4d7c0f); }
svg.plot .hue3 { color: var(--hue3, #7e3aa8); }
svg.plot .hue4 { color: var(--hue4, #8a6d00); }
"""

_HUES = 5
_CURVE_HEIGHT = 200
_SCATTER_HEIGHT = 286
_BINS = 24
_LABELLED = 10
_ROW = 19
_LABEL = 132


@dataclass(frozen=True)
class Numbers:
    """Values of one parameter, with the density that they should have.

    Attributes:
        title: what it is, with its unit.
        values: (n,) lower ends of what is known of each value.
        width: how far each value may lie above its lower end, 0 or (n,): a size in whole pixels
            tells its factor up to a pixel.
        pieces: the expected density as (low, high, probability) of uniform pieces; None when
            unknown. Probabilities sum to 1.
        step: distance of neighbours where the values are whole numbers; bars then do not part one.
    """

    title: str
    values: NDArray[np.float64]
    width: NDArray[np.float64] | float = 0.0
    pieces: tuple[tuple[float, float, float], ...] | None = None
    step: float | None = None

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Choices:
    """How often each of some exclusive choices was made, and how often it should have been.

    Attributes:
        title: what was chosen.
        counts: by choice.
        probabilities: by choice, summing to 1; None when unknown.
    """

    title: str
    counts: Mapping[str, int]
    probabilities: Mapping[str, float] | None = None

    def __len__(self) -> int:
        return sum(self.counts.values())


class Point(NamedTuple):
    """A place on a curve; `label` stands beside it."""

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True)
class Curves:
    """One quantity over another.

    Attributes:
        title: what is compared.
        x, y: the two quantities, with their units.
        curves: points by name, each joined in order; at most five.
        logarithmic: x, which is then above 0, goes by its logarithm.
    """

    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[Point]]
    logarithmic: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.curves.values()))


@dataclass(frozen=True)
class Overlaid:
    """The distributions of one figure in several sets, over each other.

    Attributes:
        title: what it is, with its unit.
        sets: values by name, at most five; each is drawn as shares of its own number.
    """

    title: str
    sets: Mapping[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return sum(map(len, self.sets.values()))


@dataclass(frozen=True)
class Scatter:
    """One quantity of the same things twice, such as by two systems, a dot for each thing.

    Attributes:
        title: the quantity, with its unit.
        x, y: whose it is.
        points: `label` names the thing.
        better: which way of the quantity is better, `higher` or `lower`.
    """

    title: str
    x: str
    y: str
    points: Sequence[Point]
    better: str = "higher"

    def __len__(self) -> int:
        return len(self.points)

    @property
    def wins(self) -> int:
        """Of how many things y is better than x."""
        return sum(map(self.is_better, self.points))

    def is_better(self, point: Point) -> bool:
        """Whether y is better than x."""
        return point.y > point.x if self.better == "higher" else point.y < point.x


Plot = Numbers | Choices


def svg(plot: Plot | Curves | Scatter | Overlaid) -> str:
    """The plot as an `<svg>` element: curves or outlines with a legend; dots about the diagonal; or
    bars, and where it is known the expectation as a line, with a band of two standard deviations of
    what that many draws give by chance."""
    if isinstance(plot, Curves):
        return _curves(plot)
    if isinstance(plot, Scatter):
        return _scatter(plot)
    if isinstance(plot, Overlaid):
        return _overlaid(plot)
    return _choices(plot) if isinstance(plot, Choices) else _numbers(plot)


def document(plot: Plot | Curves | Scatter | Overlaid, width: int = 2 * WIDTH) -> str:
    """The plot as an SVG file, on white, `width` pixels wide."""
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}"'
    element = svg(plot).replace("<svg", opening, 1)
    head, rest = element.split(">", 1)
    ground = f'<style>{PLOT_CSS}</style><rect width="100%" height="100%" fill="#fff"/>'
    return f"{head}>{ground}{rest}\n"


def histogram(plot: Numbers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Edges (bins + 1,) and counts (bins,) of the bars; fractions where a value is not exact.

    The bars span the expected range and, should values lie outside, those too.
    """
    values = np.asarray(plot.values, dtype=np.float64)
    width = np.broadcast_to(np.asarray(plot.width, dtype=np.float64), values.shape)
    half = (plot.step or 0.0) / 2
    ends = [*(values - half), *(values + np.maximum(width, 0) + half)]
    if plot.pieces:
        low, high = min(p[0] for p in plot.pieces), max(p[1] for p in plot.pieces)
        # What rounding alone moves over the end belongs to the last bar.
        slack = float(width.max(initial=0.0)) * 1.01 + 1e-9
        outside = [end for end in ends if end < low - slack or end > high + slack]
        ends = [low, high, *outside]
    if not ends:
        return np.array([0.0, 1.0]), np.zeros(1)
    low, high = float(min(ends)), float(max(ends))
    if plot.step:
        size = plot.step * max(1, math.ceil((high - low) / plot.step / _BINS))
        edges = low + size * np.arange(max(1, math.ceil((high - low) / size - 1e-9)) + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    # Values strictly inside a bar count fully; one of some width, by what lies below each edge.
    inside = np.clip(values, edges[0], edges[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (edges[:, None] - values) / width
    below = np.where(width > 0, np.clip(share, 0, 1), inside < edges[:, None])
    below[0], below[-1] = 0, 1  # rounding moves a value over an end at most
    counts: NDArray[np.float64] = np.diff(below.sum(axis=1, dtype=np.float64))
    return np.asarray(edges, dtype=np.float64), counts


def expected(plot: Numbers, edges: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Probability of each bar (bins,), or None when the plot states no density."""
    if plot.pieces is None:
        return None
    result = np.zeros(len(edges) - 1)
    for low, high, probability in plot.pieces:
        if high > low:
            overlap = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
            result += probability * np.maximum(overlap, 0) / (high - low)
        else:
            place = np.clip(np.searchsorted(edges, low, "right") - 1, 0, len(result) - 1)
            result[place] += probability
    return result


def _numbers(plot: Numbers) -> str:
    edges, counts = histogram(plot)
    wanted = expected(plot, edges)
    total = len(plot)
    left, right, top, bottom = 6.0, WIDTH - 6.0, 6.0, HEIGHT - 18.0
    low, high = float(edges[0]), float(edges[-1])

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    lower = upper = line = None
    most = float(counts.max(initial=1.0))
    if wanted is not None:
        line = wanted * total
        spread = 2 * np.sqrt(total * wanted * (1 - wanted))
        lower, upper = np.maximum(line - spread, 0), line + spread
        most = max(most, float(upper.max()))

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / max(most, 1e-9)

    parts = []
    for index, count in enumerate(counts):
        about = f"{edges[index]:.4g} to {edges[index + 1]:.4g}: {count:.0f}"
        if line is not None:
            about += f", expected {line[index]:.1f}"
        parts.append(
            f'<rect class="bar" x="{x(edges[index]) + 0.5:.1f}" y="{y(count):.1f}" '
            f'width="{max(x(edges[index + 1]) - x(edges[index]) - 1, 0.5):.1f}" '
            f'height="{bottom - y(count):.1f}"><title>{about}</title></rect>'
        )
    if line is not None and lower is not None and upper is not None:
        over = [
            f"{x(edges[i + k]):.1f},{y(upper[i]):.1f}" for i in range(len(line)) for k in (0, 1)
        ]
        under = [
            f"{x(edges[i + k]):.1f},{y(lower[i]):.1f}" for i in range(len(line)) for k in (0, 1)
        ]
        parts.append(f'<polygon class="band" points="{" ".join([*over, *reversed(under)])}"/>')
        steps = [
            f"{x(edges[i + k]):.1f},{y(line[i]):.1f}" for i in range(len(line)) for k in (0, 1)
        ]
        parts.append(f'<polyline class="line" points="{" ".join(steps)}"/>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for tick in _ticks_of(plot, edges):
        parts.append(
            f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{bottom}" '
            f'y2="{bottom + 3}"/><text x="{x(tick):.1f}" y="{bottom + 14}" '
            f'text-anchor="{_anchor(x(tick), left, right)}">{tick:g}</text>'
        )
    return _frame(plot.title, HEIGHT, parts)


def _choices(plot: Choices) -> str:
    total = len(plot)
    wanted = plot.probabilities or {}
    names = [*wanted, *(name for name in plot.counts if name not in wanted)]
    shares = {name: plot.counts.get(name, 0) / max(total, 1) for name in names}
    spread = {p: 2 * math.sqrt(wanted[p] * (1 - wanted[p]) / max(total, 1)) for p in wanted}
    most = max([*shares.values(), *(wanted[p] + spread[p] for p in wanted), 1e-9])
    left, right = float(_LABEL), WIDTH - 46.0

    def x(share: float) -> float:
        return left + (right - left) * max(share, 0) / most

    parts = []
    for index, name in enumerate(names):
        top = 2 + index * _ROW
        count, share = plot.counts.get(name, 0), shares[name]
        label = html.escape(name if len(name) <= 24 else name[:23] + "…")
        about = f"{html.escape(name)}: {count} of {total}"
        if name in wanted:
            about += f", expected {wanted[name] * total:.1f}"
        parts.append(
            f'<text x="{left - 6}" y="{top + 11}" text-anchor="end">{label}</text>'
            f'<rect class="bar" x="{left}" y="{top + 1}" width="{x(share) - left:.1f}" '
            f'height="{_ROW - 5}"><title>{about}</title></rect>'
            f'<text class="count" x="{WIDTH - 2}" y="{top + 11}" text-anchor="end">'
            f"{share:.1%}</text>"
        )
        if name in wanted:
            low, high = x(wanted[name] - spread[name]), x(wanted[name] + spread[name])
            parts.append(
                f'<rect class="band" x="{low:.1f}" y="{top - 0.5}" width="{high - low:.1f}" '
                f'height="{_ROW - 2}"/><path class="line" '
                f'd="M{x(wanted[name]):.1f} {top - 0.5}v{_ROW - 2}"/>'
            )
    parts.append(f'<line class="axis" x1="{left}" x2="{left}" y1="0" y2="{len(names) * _ROW}"/>')
    return _frame(plot.title, max(len(names), 1) * _ROW + 2, parts)


def _curves(plot: Curves) -> str:
    _check_hues(len(plot.curves))
    points = [point for curve in plot.curves.values() for point in curve] or [Point(1, 0)]
    left, right, top, bottom = 40.0, WIDTH - 12.0, 38.0, _CURVE_HEIGHT - 30.0
    scale = math.log10 if plot.logarithmic else float
    low, high = _wide(min(scale(p.x) for p in points), max(scale(p.x) for p in points))
    floor, ceiling = _wide(min(p.y for p in points), max(p.y for p in points))

    def x(value: float) -> float:
        return left + (right - left) * (scale(value) - low) / (high - low)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - floor) / (ceiling - floor)

    parts = [f'<path class="axis" fill="none" d="M{left} {top}V{bottom}H{right}"/>']
    decades = _decades(low, high) if plot.logarithmic else ticks(low, high)
    for tick in decades:
        parts.append(
            f'<path class="axis" d="M{x(tick):.1f} {bottom}v3"/>'
            f'<text x="{x(tick):.1f}" y="{bottom + 13}" text-anchor="middle">{tick:g}</text>'
        )
    for tick in ticks(floor, ceiling):
        parts.append(
            f'<path class="axis" d="M{left} {y(tick):.1f}h-3"/>'
            f'<text x="{left - 5}" y="{y(tick) + 3:.1f}" text-anchor="end">{tick:g}</text>'
        )
    parts.append(
        f'<text class="count" x="{left - 34}" y="10">{html.escape(plot.y)}</text>'
        f'<text class="count" x="{right}" y="{_CURVE_HEIGHT - 4}" text-anchor="end">'
        f"{html.escape(plot.x)}</text>"
    )
    legend = left - 34
    for hue, (name, curve) in enumerate(plot.curves.items()):
        line = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in curve)
        parts.append(f'<g class="hue{hue}"><polyline class="curve" points="{line}"/>')
        for p in curve:
            about = html.escape(f"{name} {p.label}: {p.x:.4g}, {p.y:.4g}")
            parts.append(
                f'<circle class="dot" cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="2">'
                f"<title>{about}</title></circle>"
                f'<text class="count" x="{x(p.x):.1f}" y="{y(p.y) - 4:.1f}" style="font-size: 7px" '
                f'text-anchor="middle">{html.escape(p.label)}</text>'
            )
        parts.append(
            f'<path class="curve" d="M{legend:g} 21h12"/>'
            f'<text x="{legend + 15:g}" y="24">{html.escape(name)}</text></g>'
        )
        legend += 26 + 5.2 * len(name)  # about the width of a letter
    return _frame(plot.title, _CURVE_HEIGHT, parts)


def _overlaid(plot: Overlaid) -> str:
    _check_hues(len(plot.sets))
    left, right, top, bottom = 6.0, WIDTH - 6.0, 24.0, HEIGHT + 8.0
    together = [float(value) for of in plot.sets.values() for value in of] or [0.0]
    low, high = min(together), max(together)
    low, high = (low, high) if low < high else _wide(low, high)
    edges = np.linspace(low, high, _BINS + 1)
    shares = {name: np.histogram(of, edges)[0] / max(len(of), 1) for name, of in plot.sets.items()}
    most = max((float(share.max()) for share in shares.values()), default=1.0) or 1.0

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    parts = []
    legend = left
    for hue, (name, share) in enumerate(shares.items()):
        heights = bottom - (bottom - top) * share / most
        steps = [f"{x(edges[i + k]):.1f},{heights[i]:.1f}" for i in range(_BINS) for k in (0, 1)]
        outline = " ".join([f"{left},{bottom}", *steps, f"{right},{bottom}"])
        text = html.escape(f"{name} ({len(plot.sets[name])})")
        parts.append(
            f'<g class="hue{hue}"><polygon class="area" points="{outline}"/>'
            f'<polyline class="curve" points="{outline}"><title>{text}</title></polyline>'
            f'<path class="curve" d="M{legend:g} 9h12"/>'
            f'<text x="{legend + 15:g}" y="12">{text}</text></g>'
        )
        legend += 26 + 5.2 * len(text)  # about the width of a letter
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for tick in ticks(low, high):
        parts.append(
            f'<path class="axis" d="M{x(tick):.1f} {bottom}v3"/>'
            f'<text x="{x(tick):.1f}" y="{bottom + 14}" '
            f'text-anchor="{_anchor(x(tick), left, right)}">{tick:g}</text>'
        )
    return _frame(plot.title, bottom + 18, parts)


def _check_hues(count: int) -> None:
    if count > _HUES:
        raise ValueError(f"at most {_HUES} curves are told apart, {count} given")


def _scatter(plot: Scatter) -> str:
    left, right, top, bottom = 40.0, WIDTH - 10.0, 8.0, _SCATTER_HEIGHT - 28.0
    values = [value for p in plot.points for value in (p.x, p.y)] or [0.0]
    low, high = _wide(min(values), max(values))  # of both axes: equal values are the diagonal

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = [
        f'<path class="axis" fill="none" d="M{left} {top}V{bottom}H{right}"/>'
        f'<path class="diagonal" d="M{left} {bottom}L{right} {top}"/>'
    ]
    for tick in ticks(low, high):
        parts.append(
            f'<path class="axis" d="M{x(tick):.1f} {bottom}v3M{left} {y(tick):.1f}h-3"/>'
            f'<text x="{x(tick):.1f}" y="{bottom + 13}" text-anchor="middle">{tick:g}</text>'
            f'<text x="{left - 5}" y="{y(tick) + 3:.1f}" text-anchor="end">{tick:g}</text>'
        )
    above, below = "hue1", "hue0"
    words = [("better", above), ("worse", below)]
    if plot.better == "lower":
        words.reverse()
    for (word, hue), (place, height, anchor) in zip(
        words, ((left + 8, top + 12, "start"), (right - 4, bottom - 8, "end"))
    ):
        parts.append(
            f'<text class="side {hue}" x="{place}" y="{height}" text-anchor="{anchor}">'
            f"{html.escape(plot.y)} {word}</text>"
        )
    parts.append(
        f'<text class="count" x="{right}" y="{_SCATTER_HEIGHT - 3}" text-anchor="end">'
        f'{html.escape(plot.x)}</text><text class="count" text-anchor="end" '
        f'transform="translate(9 {top}) rotate(-90)">{html.escape(plot.y)}</text><g class="spread">'
    )
    for p in plot.points:
        about = html.escape(f"{p.label}: {plot.y} {p.y:.4g}, {plot.x} {p.x:.4g}")
        hue = above if plot.is_better(p) else below
        parts.append(
            f'<circle class="dot {hue}" cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="3">'
            f"<title>{about}</title></circle>"
        )
    return _frame(plot.title, _SCATTER_HEIGHT, [*parts, "</g>"])


def _wide(low: float, high: float) -> tuple[float, float]:
    """The range and 4% on either side; something about a single value."""
    margin = 0.04 * (high - low) or 0.5 * abs(low) or 0.5
    return low - margin, high + margin


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from 10^low to 10^high; round numbers when they are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    inside = [value for value in found if low <= math.log10(value) <= high]
    return inside if len(inside) > 1 else ticks(10.0**low, 10.0**high)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Up to `most` round numbers in [low, high], evenly spaced by 1, 2, 2.5 or 5 times 10^k."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / most))
    size = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if span / (m * power) <= most - 1)
    first = math.ceil(low / size - 1e-9)
    last = math.floor(high / size + 1e-9)
    return [round(index * size, 10) for index in range(first, last + 1)]


def _ticks_of(plot: Numbers, edges: NDArray[np.float64]) -> list[float]:
    """Round numbers; where the values are whole, values that occur."""
    if plot.step is None:
        return ticks(float(edges[0]), float(edges[-1]))
    first, last = float(edges[0]) + plot.step / 2, float(edges[-1]) - plot.step / 2
    count = round((last - first) / plot.step) + 1
    if count <= _LABELLED:
        return [first + plot.step * index for index in range(count)]
    return [tick for tick in ticks(first, last) if ((tick - first) / plot.step).is_integer()]


def _anchor(place: float, left: float, right: float) -> str:
    if place < left + 8:
        return "start"
    return "end" if place > right - 8 else "middle"


def _frame(title: str, height: float, parts: list[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )
