"""Plots: every value is in a bar or on its curve, axes have round numbers, and the SVG is one."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from teasr.plots import (
    Choices,
    Curves,
    Numbers,
    Overlaid,
    Point,
    Scatter,
    document,
    expected,
    histogram,
    svg,
    ticks,
)


@pytest.mark.parametrize(
    "plot",
    [
        Numbers("exact", np.linspace(3, 4, 50)),
        Numbers("one value", np.full(7, 2.5)),
        Numbers("whole", np.array([3.0, 3, 4, 9]), step=1),
        Numbers("one whole", np.array([256.0] * 5), step=1),
        Numbers("wide", np.arange(60.0, 96), width=np.full(36, 1.0)),
        Numbers("outside", np.array([-5.0, 0.5, 7]), pieces=((0.0, 1.0, 1.0),)),
        Numbers("at the ends", np.array([0.0, 1.0]), pieces=((0.0, 1.0, 1.0),)),
        Numbers("none", np.array([])),
    ],
    ids=lambda plot: plot.title,
)
def test_every_value_is_in_a_bar(plot: Numbers) -> None:
    edges, counts = histogram(plot)
    assert counts.sum() == pytest.approx(len(plot)) and (counts >= 0).all()
    assert (np.diff(edges) > 0).all()
    assert ElementTree.fromstring(svg(plot)).tag == "svg"


def test_whole_numbers_stand_in_bars_of_their_own() -> None:
    edges, counts = histogram(Numbers("n", np.array([3.0, 3, 4, 9]), step=1))
    assert counts.tolist() == [2, 1, 0, 0, 0, 0, 1]
    assert edges[0] == 2.5 and edges[-1] == 9.5


def test_expectation_follows_the_pieces() -> None:
    plot = Numbers("b", np.array([1.0]), pieces=((1.0, 1.0, 0.5), (1.0, 2.0, 0.5)))
    edges, _ = histogram(plot)
    wanted = expected(plot, edges)
    assert wanted is not None and wanted.sum() == pytest.approx(1)
    assert wanted[0] == pytest.approx(0.5 + 0.5 / len(wanted))


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for low, high in ((0.05, 3), (-180, 180), (30, 95), (1e-6, 3e-6), (0, 12345)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 6 and low <= min(found) and max(found) <= high


def test_text_is_escaped() -> None:
    plot = Choices("<b>", {"<script>": 3}, {"&": 1.0})
    assert "<script>" not in svg(plot)
    assert ElementTree.fromstring(svg(plot)).get("aria-label") == "<b>"


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("last", [(16.0, 0.25), (2.4, 0.4), (2.0, 0.3)])
def test_every_point_is_on_its_curve_in_place(last: tuple[float, float], logarithmic: bool) -> None:
    curves = {"few": [Point(2.0, 0.3, "1"), Point(*last, "8")], "any": [Point(4.0, 0.35, "2")]}
    plot = Curves("dial", "s/MP", "LPIPS", curves, logarithmic)
    root = ElementTree.fromstring(svg(plot))
    dots = [(float(d.get("cx", 0)), float(d.get("cy", 0))) for d in root.iter("circle")]
    assert len(dots) == len(plot) == 3
    points = [point for curve in curves.values() for point in curve]
    for a, first in zip(points, dots):
        for b, second in zip(points, dots):
            assert (a.x < b.x) == (first[0] < second[0])
            assert (a.y < b.y) == (first[1] > second[1])  # SVG counts downwards
    width, height = map(float, root.get("viewBox", "").split()[2:])
    assert all(0 < x < width and 0 < y < height for x, y in dots)
    lines = [line.get("points", "").split() for line in root.iter("polyline")]
    assert lines == [[f"{x},{y}" for x, y in part] for part in (dots[:2], dots[2:])]
    labels = [text.text for text in root.iter("text")]
    assert {"few", "any", "1", "8", "2", "s/MP", "LPIPS"} <= set(labels)
    middle = [
        t for t in root.iter("text") if t.get("text-anchor") == "middle" and not t.get("style")
    ]
    assert len(middle) >= 2  # ticks of x


def test_curves_without_points_and_too_many_curves() -> None:
    ElementTree.fromstring(svg(Curves("none", "x", "y", {"a": []})))
    with pytest.raises(ValueError, match="at most 5"):
        svg(Curves("many", "x", "y", {str(i): [] for i in range(6)}))


def test_a_document_stands_alone() -> None:
    plot = Curves("<dial>", "x", "y", {"a&b": [Point(1, 2)]})
    root = ElementTree.fromstring(document(plot, 640))
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("width") == "640"
    assert "currentColor" in (root[0].text or "") and root.get("aria-label") == "<dial>"


def test_distributions_lie_over_each_other() -> None:
    low, high = np.linspace(0, 1, 400), np.linspace(1, 2, 40)
    root = ElementTree.fromstring(svg(Overlaid("a < b", {"one": low, "other": high})))
    one, other = (
        np.array([point.split(",") for point in line.attrib["points"].split()], float)
        for line in root.iter("polyline")
    )
    # Each in shares of its own number: equal heights, one at the left and one at the right.
    assert one[:, 1].min() == pytest.approx(other[:, 1].min(), abs=20)
    assert one[one[:, 1] < 100, 0].max() < 160 and other[other[:, 1] < 100, 0].min() > 140
    assert [text.text for text in root.iter("text")][:2] == ["one (400)", "other (40)"]
    for values in ({}, {"none": np.array([])}, {"one": np.array([3.0])}):
        assert ElementTree.fromstring(svg(Overlaid("few", values))).tag == "svg"


@pytest.mark.parametrize(("better", "wins"), [("higher", 1), ("lower", 2)])
def test_a_dot_is_above_the_diagonal_where_y_is_more(better: str, wins: int) -> None:
    points = [Point(20, 24, "<a>"), Point(24, 20, "b"), Point(22, 21, "c"), Point(23, 23, "d")]
    plot = Scatter("PSNR-Y", "old", "new", points, better)
    assert (plot.wins, len(plot)) == (wins, 4)
    root = ElementTree.fromstring(svg(plot))
    paths = {path.get("class"): path.get("d", "") for path in root.iter("path")}
    (left, bottom), (right, top) = (
        map(float, pair.split()) for pair in paths["diagonal"][1:].split("L")
    )
    slope = (top - bottom) / (right - left)
    dots = list(root.iter("circle"))
    for point, dot in zip(points, dots):
        x, y = float(dot.get("cx", 0)), float(dot.get("cy", 0))
        above = bottom + slope * (x - left) - y  # y of an SVG grows downwards
        assert (abs(above) < 0.2) if point.y == point.x else (above > 0) == (point.y > point.x)
        assert dot.get("class") == f"dot hue{1 if plot.is_better(point) else 0}"
    assert dots[0][0].text == "<a>: new 24, old 20"
    words = [text.text for text in root.iter("text") if "side" in text.get("class", "")]
    assert words == (
        ["new better", "new worse"] if better == "higher" else ["new worse", "new better"]
    )
