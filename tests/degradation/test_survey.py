"""Distributions: what is drawn agrees with what a preset says, and what is not shows."""

from __future__ import annotations

import numpy as np
import pytest

from teasr.degradation import PRESETS, Degradation, DegradationSettings, draw
from teasr.degradation.survey import describe, short, stages, survey
from teasr.errors import UsageError
from teasr.plots import Choices, Plot, expected, histogram

COLOURED = DegradationSettings.from_mapping(
    {
        **PRESETS["teasr"].model_dump(),
        "name": "coloured",
        "colour": {"jitter_probability": 0.3, "grey_probability": 0.1},
    },
    "test",
)


def recipes(settings: DegradationSettings, count: int = 3000) -> list[tuple[dict, int, int]]:
    generator = np.random.default_rng(5)
    steps = (draw(settings, 192, 256, generator) for _ in range(count))
    return [({"scale": 4, "steps": [s.to_dict() for s in one]}, 192, 256) for one in steps]


def deviations(plot: Plot) -> np.ndarray:
    """By how many standard deviations each bar misses its expectation; bars of 5 and more."""
    if isinstance(plot, Choices):
        assert plot.probabilities is not None and set(plot.counts) <= set(plot.probabilities)
        wanted = np.array(list(plot.probabilities.values()))
        counts = np.array([plot.counts.get(name, 0) for name in plot.probabilities], float)
    else:
        edges, counts = histogram(plot)
        density = expected(plot, edges)
        assert density is not None
        wanted = density
    assert wanted.sum() == pytest.approx(1)
    assert counts.sum() == pytest.approx(len(plot))
    spread = np.sqrt(len(plot) * wanted * (1 - wanted))
    return np.abs(counts - len(plot) * wanted)[wanted * len(plot) >= 5] / np.maximum(
        spread[wanted * len(plot) >= 5], 1e-6
    )


@pytest.mark.parametrize("settings", [*PRESETS.values(), COLOURED], ids=lambda s: s.name)
def test_draws_agree_with_their_preset(settings: DegradationSettings) -> None:
    groups, others = survey(recipes(settings), settings)
    assert others == 0
    assert [len(group) for group in groups.values()] == [16, 15, 9 if settings is COLOURED else 6]
    for name, group in groups.items():
        for plot in group:
            worst = deviations(plot).max(initial=0)
            assert worst < 4.5, f"{name}, {plot.title}: {worst:.1f} standard deviations"


def test_draws_of_another_preset_stand_out() -> None:
    groups, _ = survey(recipes(PRESETS["realesrgan"]), PRESETS["teasr"])
    missed = {
        plot.title
        for plot in (*groups["Stage one"], *groups["Stage two"])
        if deviations(plot).max(initial=0) > 6
    }
    assert {"JPEG quality", "resize factor, when not kept", "blurred at all"} <= missed
    edges, counts = histogram(next(p for p in groups["Stage one"] if p.title == "JPEG quality"))
    assert edges[0] <= 30 and edges[-1] >= 95 and counts.sum() == 3000  # what lies outside is shown


def test_without_a_preset_nothing_is_marked() -> None:
    groups, _ = survey(recipes(PRESETS["teasr"], 20), None)
    for plot in (plot for group in groups.values() for plot in group):
        assert (plot.probabilities if isinstance(plot, Choices) else plot.pieces) is None


def test_other_recipes_are_counted_and_left_out() -> None:
    good = recipes(PRESETS["teasr"], 3)
    broken = [
        ({}, 8, 8),
        ({"steps": [{"operator": "jpeg", "params": {"quality": 3}}], "scale": 4}, 8, 8),
        ({**good[0][0], "scale": 0}, 8, 8),
        ({**good[0][0], "steps": [{"operator": "blur"}]}, 8, 8),
    ]
    groups, others = survey([*good, *broken], None)
    assert others == 4 and len(groups["Stage one"][0]) == 3


def test_every_step_is_told_with_its_parameters() -> None:
    hr = np.full((64, 64, 3), 128, np.uint8)
    for number in range(40):
        pair = Degradation(COLOURED, seed=number)(hr, key="a")
        parts = stages(pair.recipe)
        told = [describe(*step, 64) for step in (*parts.first, *parts.second, *parts.last)]
        assert len(told) == len(pair.recipe["steps"])
        for line, step in zip(told, pair.recipe["steps"]):
            line = line.replace("\N{NO-BREAK SPACE}", " ")
            if step["operator"] == "jpeg":
                assert line == f"JPEG: quality {step['params']['quality']}"
            elif step["operator"] == "resize":
                assert f"{step['params']['width']} × {step['params']['height']}" in line
                assert f"× {step['params']['width'] / 64:.2f}" in line
            elif "grey" in step["params"]:
                assert line.endswith("grey" if step["params"]["grey"] else "colour")
        assert short(pair.recipe).isascii() and short(pair.recipe).count("|") == 2
    assert describe("sing", {"loud": True}) == "sing: loud True"
    with pytest.raises(UsageError, match="two-stage"):
        stages({"steps": "none"})
