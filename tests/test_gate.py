"""The gate on evaluations whose answers are known in closed form."""

from __future__ import annotations

import math

import pytest

from teasr.errors import TeasrError, UsageError
from teasr.evaluation import Evaluation
from teasr.gate import GateSettings, Verdict, decide
from teasr.metrics import Scores

PICTURES = 12


def evaluation(
    gain: float = 1.0,
    lpips: float | None = 0.3,
    four_steps: float | None = 0.0,
    benchmark: str = "bench-1",
    pictures: int = PICTURES,
) -> Evaluation:
    """Bicubic at 20 + i dB; one step `gain` above it, four steps `four_steps` above that."""

    def at(rise: float, distance: float | None) -> dict[str, Scores]:
        return {f"p{i}": Scores(20.0 + i + rise, 0.6, distance) for i in range(pictures)}

    scores = {"bicubic": at(0, lpips), "1 step": at(gain, lpips)}
    if four_steps is not None:
        scores["4 steps"] = at(gain + four_steps, lpips)
    return Evaluation(benchmark, scores)


def result(verdict: Verdict, part: str) -> bool | None:
    (check,) = (check for check in verdict.checks if part in check.name)
    return check.passed


def test_first_champion_needs_only_its_own_figures() -> None:
    verdict = decide(evaluation(), None, GateSettings())
    assert verdict.passed
    assert [check.name for check in verdict.checks] == [
        "better than bicubic",
        "more steps do not harm",
    ]


@pytest.mark.parametrize(("gain", "passes"), [(0.0, False), (-0.2, False), (1e-6, True)])
def test_floor_is_strict(gain: float, passes: bool) -> None:
    assert decide(evaluation(gain), None, GateSettings()).passed is passes


@pytest.mark.parametrize(
    ("gain", "passes"), [(2.0, True), (1.0, True), (0.95, True), (0.85, False), (0.1, False)]
)
def test_uniform_change_against_the_champion(gain: float, passes: bool) -> None:
    """A uniform change has no spread: its interval is a point, 0.1 dB may be lost."""
    verdict = decide(evaluation(gain), evaluation(1.0), GateSettings(max_psnr_drop_db=0.1))
    assert verdict.passed is passes
    assert result(verdict, "PSNR-Y") is passes


def test_no_difference_with_a_wide_spread_is_not_enough() -> None:
    """Means are equal, but a few pictures cannot show that the loss stays below 0.1 dB."""
    candidate, champion = evaluation(1.0), evaluation(1.0)
    for i, scores in enumerate(candidate.scores["1 step"].values()):
        scores.psnr_y += 1.0 if i % 2 else -1.0
    assert result(decide(candidate, champion, GateSettings()), "PSNR-Y") is False
    assert result(decide(candidate, champion, GateSettings(max_psnr_drop_db=2)), "PSNR-Y") is True


def test_lpips_may_rise_only_so_far() -> None:
    settings = GateSettings(max_lpips_rise=0.01)
    champion = evaluation(lpips=0.3)
    assert decide(evaluation(lpips=0.305), champion, settings).passed
    assert decide(evaluation(lpips=0.1), champion, settings).passed
    assert result(decide(evaluation(lpips=0.32), champion, settings), "LPIPS") is False


def test_lpips_of_one_only_is_not_measured_and_does_not_fail() -> None:
    for candidate, champion in ((None, 0.3), (0.3, None), (None, None)):
        verdict = decide(evaluation(lpips=candidate), evaluation(lpips=champion), GateSettings())
        assert verdict.passed
        assert result(verdict, "LPIPS") is None
        assert "not measured" in verdict.checks[-1].detail


@pytest.mark.parametrize(("change", "passes"), [(0.3, True), (-0.4, True), (-0.6, False)])
def test_more_steps_do_not_harm(change: float, passes: bool) -> None:
    verdict = decide(evaluation(four_steps=change), None, GateSettings(max_steps_drop_db=0.5))
    assert verdict.passed is passes


def test_more_steps_not_evaluated() -> None:
    verdict = decide(evaluation(four_steps=None), None, GateSettings())
    assert verdict.passed
    assert verdict.checks[1].passed is None
    assert "4 steps" in verdict.checks[1].detail


def test_another_benchmark_is_refused_however_good() -> None:
    verdict = decide(evaluation(9.0), evaluation(1.0, benchmark="bench-2"), GateSettings())
    assert not verdict.passed
    assert result(verdict, "same benchmark") is False
    assert "bench-1" in verdict.to_markdown() and "bench-2" in verdict.to_markdown()
    assert result(verdict, "PSNR-Y") is None


def test_other_pictures_or_a_missing_system_are_refused() -> None:
    fewer = evaluation(9.0, pictures=PICTURES - 2)
    assert not decide(fewer, evaluation(), GateSettings()).passed
    for who in ("bicubic", "1 step"):
        without = evaluation(9.0)
        del without.scores[who]
        verdict = decide(without, None, GateSettings())
        assert not verdict.passed and who in verdict.checks[0].detail


def test_pictures_are_paired_by_key_not_by_order() -> None:
    champion = evaluation(1.0)
    pictures = champion.scores["1 step"]
    champion.scores["1 step"] = dict(reversed(pictures.items()))
    assert decide(evaluation(1.0), champion, GateSettings()).passed


def test_a_perfect_picture_is_a_large_number_not_a_nan() -> None:
    perfect = evaluation(2.0)
    for system in ("1 step", "4 steps"):
        perfect.scores[system]["p0"].psnr_y = math.inf
    assert decide(perfect, evaluation(1.0), GateSettings()).passed
    assert decide(perfect, perfect, GateSettings()).passed


def test_equal_inputs_give_an_equal_verdict_that_survives_json() -> None:
    candidate = evaluation(1.0)
    for i, scores in enumerate(candidate.scores["1 step"].values()):
        scores.psnr_y += math.sin(i)
    first = decide(candidate, evaluation(1.0), GateSettings(), seed=3)
    assert first == decide(candidate, evaluation(1.0), GateSettings(), seed=3)
    assert Verdict.from_json(first.to_json()) == first
    with pytest.raises(TeasrError, match="not a verdict"):
        Verdict.from_json("[]")


def test_wrong_settings_name_the_field() -> None:
    with pytest.raises(UsageError, match="max_psnr_drop_db"):
        GateSettings.from_mapping({"max_psnr_drop_db": -1}, "gate.yaml")
