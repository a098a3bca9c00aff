from __future__ import annotations

import csv
import io
import json
import math

import pytest

from teasr.errors import TeasrError
from teasr.evaluation import (
    BICUBIC,
    DEFAULT_METRICS,
    METRICS,
    Evaluation,
    summary_rows,
    system_name,
)
from teasr.metrics import Scores, bootstrap_interval


def evaluation() -> Evaluation:
    return Evaluation(
        "fingerprint",
        {
            BICUBIC: {"a,1": Scores(24.5, 0.75, None), "b": Scores(math.inf, 1.0, None)},
            "4 steps": {"a,1": Scores(25.5, 0.5, 0.25), "b": Scores(26.5, 0.7, 0.75)},
        },
        {BICUBIC: 0.5, "4 steps": 12.25},
    )


def test_json_round_trip_with_infinity_and_missing_metrics() -> None:
    assert Evaluation.from_json(evaluation().to_json()) == evaluation()
    assert list(Evaluation.from_json(evaluation().to_json()).scores) == [BICUBIC, "4 steps"]


def test_a_document_of_an_earlier_release_is_read() -> None:
    """The registry holds such: three metrics, no intervals."""
    text = (
        '{"benchmark": "x", "seconds_per_megapixel": {"bicubic": 0.5}, "scores": {"bicubic": '
        '{"a": {"psnr_y": 24.5, "ssim_y": 0.75, "lpips": null}}}}'
    )
    scores = {BICUBIC: {"a": Scores(24.5, 0.75)}}
    assert Evaluation.from_json(text) == Evaluation("x", scores, {BICUBIC: 0.5})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"benchmark": "x", "scores": {}}',
        '{"benchmark": "x", "scores": {"a": 3}, "seconds_per_megapixel": {}}',
        '{"benchmark": "x", "scores": {"a": {"k": {"psnr": 1}}}, "seconds_per_megapixel": {}}',
        evaluation().to_json()[:-20],
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(TeasrError, match="not an evaluation"):
        Evaluation.from_json(text)


def test_csv_has_a_line_per_picture_and_system() -> None:
    rows = list(csv.reader(io.StringIO(evaluation().to_csv())))
    assert rows == [
        ["picture", "system", "psnr_y", "ssim_y", "lpips", "dists", "niqe"],
        ["a,1", "bicubic", "24.500000", "0.750000", "", "", ""],
        ["b", "bicubic", "inf", "1.000000", "", "", ""],
        ["a,1", "4 steps", "25.500000", "0.500000", "0.250000", "", ""],
        ["b", "4 steps", "26.500000", "0.700000", "0.750000", "", ""],
    ]
    found = evaluation()
    found.scores[BICUBIC] = {key: Scores(1, 1, musiq=50) for key in ("a,1", "b")}
    heading, first, *_ = found.to_csv().splitlines()
    assert heading.endswith(",niqe,musiq") and first.endswith(",,,50.000000")


def test_values_and_means() -> None:
    found = evaluation()
    assert found.values("4 steps", "psnr_y") == [25.5, 26.5]
    assert found.mean("4 steps", "lpips") == 0.5
    assert found.mean(BICUBIC, "psnr_y") == math.inf
    assert found.values(BICUBIC, "lpips") == [] and found.mean(BICUBIC, "lpips") is None
    means = dict(summary_rows(found))["4 steps"]
    assert {name: mean for name, mean in means.items() if mean is not None} == pytest.approx(
        {"psnr_y": 26.0, "ssim_y": 0.6, "lpips": 0.5}
    )
    assert found.measured() == ["psnr_y", "ssim_y", "lpips"]
    assert dict(summary_rows(found))[BICUBIC]["lpips"] is None


def test_a_metric_that_one_picture_lacks_counts_as_not_measured() -> None:
    found = evaluation()
    found.scores["4 steps"]["b"] = Scores(1.0, 1.0, None)
    assert found.mean("4 steps", "lpips") is None and found.mean("4 steps", "psnr_y") == 13.25


def test_intervals_of_the_means() -> None:
    values = [20.0, 23.0, 25.0, 31.0]
    scores = {f"p{i}": Scores(value, 0.5) for i, value in enumerate(values)}
    found = Evaluation("x", {BICUBIC: scores})
    interval = found.interval(BICUBIC, "psnr_y")
    assert interval == bootstrap_interval(values, 0, 0.95, 10_000)
    assert interval is not None and 20 < interval[0] < 24.75 < interval[1] < 31
    document = json.loads(found.to_json())["intervals"]
    assert document == {BICUBIC: {"psnr_y": list(interval), "ssim_y": [0.5, 0.5]}}


def test_what_has_no_interval() -> None:
    found = evaluation()
    assert found.interval(BICUBIC, "psnr_y") is None  # one of them is infinite
    assert found.interval(BICUBIC, "lpips") is None  # not measured
    one = Evaluation("x", {BICUBIC: {"a": Scores(24.5, 0.75)}})
    assert one.interval(BICUBIC, "psnr_y") is None
    assert json.loads(one.to_json())["intervals"] == {BICUBIC: {}}


def test_a_system_that_was_not_evaluated_is_named_with_those_that_were() -> None:
    with pytest.raises(TeasrError, match=r"no '1 step'.*bicubic, 4 steps"):
        evaluation().values("1 step", "psnr_y")


def test_names() -> None:
    assert [system_name(steps) for steps in (1, 2, 16)] == ["1 step", "2 steps", "16 steps"]
    assert list(METRICS) == list(vars(Scores(0.0, 0.0)))
    assert set(DEFAULT_METRICS) < set(METRICS)
