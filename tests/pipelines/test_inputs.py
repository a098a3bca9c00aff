"""The reference for drift is what the feed's presets make of the photographs."""

from __future__ import annotations

from pipelines.feed import FeedSettings
from pipelines.inputs import training_inputs
from teasr.drift import COMPARED, SIZES, Inputs, compare


def test_figures_are_of_the_feeds_degradations(hr: str) -> None:
    settings = FeedSettings(crop=32)
    reference = training_inputs(hr, settings, count=60)
    assert training_inputs(hr, settings, count=60) == reference
    assert {*reference.figures} == {*COMPARED, *SIZES}
    assert {len(values) for values in reference.figures.values()} == {60}
    assert {*reference.figures["width"]} == {30, 31}  # photographs of 122 to 126 pixels
    assert all(60 <= value <= 100 for value in reference.figures["jpeg_quality"])
    assert len({*reference.figures["noise"]}) > 50

    again = training_inputs(hr, FeedSettings(crop=32, seed=1), count=60)
    assert again != reference
    assert not any(d.drifted for d in compare(reference, Inputs(again.figures, 60)))


def test_every_preset_has_its_share(hr: str) -> None:
    settings = FeedSettings(crop=32, preset={"teasr": 1, "realesrgan": 1})
    reference = training_inputs(hr, settings, count=60)
    assert reference.about.endswith("degraded: teasr, realesrgan")
    strong = [value for value in reference.figures["jpeg_quality"] if value < 60]
    assert 5 < len(strong) < 40  # Real-ESRGAN's goes from 30 to 95
