"""The gate on evaluations whose answers are known in closed form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from teasr.errors import TeasrError, UsageError
from teasr.evaluation import Evaluation
from teasr.gate import DEFAULT_RULES, GateSettings, Verdict, decide
from teasr.metrics import Scores

PICTURES = 12


def gate(**rules: Any) -> GateSettings:
    """The built-in rules with changes; `_` in a name stands for `-`."""
    changed = {name.replace("_", "-"): rule for name, rule in rules.items()}
    return GateSettings.from_mapping({"rules": changed}, "gate.yaml")


def only(**rule: Any) -> GateSettings:
    """A gate of the one rule `it`."""
    return gate(
        **{"better than bicubic": None, "fidelity": None}, perception=None, any_step=None, it=rule
    )


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


def result(verdict: Verdict, name: str) -> bool | None:
    (check,) = (check for check in verdict.checks if check.name == name)
    return check.passed


def test_first_champion_needs_only_its_own_figures() -> None:
    verdict = decide(evaluation(), None, GateSettings())
    assert verdict.passed
    assert [check.name for check in verdict.checks] == ["better than bicubic", "any-step"]


@pytest.mark.parametrize(("gain", "passes"), [(0.0, False), (-0.2, False), (1e-6, True)])
def test_better_is_strict(gain: float, passes: bool) -> None:
    assert decide(evaluation(gain), None, GateSettings()).passed is passes


def test_better_needs_the_whole_interval() -> None:
    """+0.1 dB in the mean, of pictures that gain or lose 1 dB, may be luck."""
    candidate = evaluation(0.1)
    for i, scores in enumerate(candidate.scores["1 step"].values()):
        scores.psnr_y += 1.0 if i % 2 else -1.0
    verdict = decide(candidate, None, GateSettings())
    check = verdict.checks[0]
    assert check.passed is False and check.value == pytest.approx(0.1)
    assert check.low is not None and check.high is not None and check.low < 0 < check.high
    assert decide(evaluation(0.1), None, GateSettings()).passed


@pytest.mark.parametrize(
    ("gain", "passes"), [(2.0, True), (1.0, True), (0.95, True), (0.85, False), (0.1, False)]
)
def test_uniform_change_against_the_champion(gain: float, passes: bool) -> None:
    """A uniform change has no spread: its interval is a point, 0.1 dB may be lost."""
    verdict = decide(evaluation(gain), evaluation(1.0), gate(fidelity={"by": 0.1}))
    assert verdict.passed is passes
    assert result(verdict, "fidelity") is passes


def test_no_difference_with_a_wide_spread_is_not_enough() -> None:
    """Means are equal, but a few pictures cannot show that the loss stays below 0.1 dB."""
    candidate, champion = evaluation(1.0), evaluation(1.0)
    for i, scores in enumerate(candidate.scores["1 step"].values()):
        scores.psnr_y += 1.0 if i % 2 else -1.0
    assert result(decide(candidate, champion, GateSettings()), "fidelity") is False
    assert result(decide(candidate, champion, gate(fidelity={"by": 2})), "fidelity") is True


@pytest.mark.parametrize(
    ("lpips", "better", "not_worse"),
    [(0.1, True, True), (0.25, False, True), (0.305, False, True), (0.32, False, False)],
)
def test_of_a_distance_less_is_better(lpips: float, better: bool, not_worse: bool) -> None:
    champion = evaluation(lpips=0.3)
    for kind, by, passes in (("better_than", 0.1, better), ("not_worse_than", 0.01, not_worse)):
        settings = only(metric="lpips", by=by, **{kind: "champion"})
        verdict = decide(evaluation(lpips=lpips), champion, settings)
        assert result(verdict, "it") is passes
        assert verdict.checks[1].limit == pytest.approx(-by if kind == "better_than" else by)


@pytest.mark.parametrize("optional", [True, False])
def test_what_was_not_measured_fails_unless_it_is_optional(optional: bool) -> None:
    rule = {"metric": "lpips", "not_worse_than": "champion", "by": 0.01, "optional": optional}
    for candidate, champion in ((None, 0.3), (0.3, None), (None, None)):
        verdict = decide(evaluation(lpips=candidate), evaluation(lpips=champion), only(**rule))
        assert verdict.passed is optional
        assert result(verdict, "it") is (None if optional else False)
        assert "not measured" in verdict.checks[-1].detail


@pytest.mark.parametrize(("change", "passes"), [(0.3, True), (-0.4, True), (-0.6, False)])
def test_more_steps_do_not_harm(change: float, passes: bool) -> None:
    verdict = decide(evaluation(four_steps=change), None, GateSettings())
    assert verdict.passed is passes


def test_more_steps_not_evaluated() -> None:
    verdict = decide(evaluation(four_steps=None), None, GateSettings())
    assert verdict.passed
    assert verdict.checks[1].passed is None
    assert "4 steps" in verdict.checks[1].detail
    assert not decide(evaluation(four_steps=None), None, gate(any_step={"optional": False})).passed


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        ({"metric": "psnr_y", "at_least": 26.4}, True),  # the mean is 26.5
        ({"metric": "psnr_y", "at_least": 26.6}, False),
        ({"metric": "lpips", "at_most": 0.3}, True),
        ({"metric": "lpips", "at_most": 0.29}, False),
        ({"metric": "seconds_per_megapixel", "at_most": 2}, True),
        ({"metric": "seconds_per_megapixel", "at_most": 1}, False),
        ({"metric": "seconds_per_megapixel", "steps": 4, "at_most": 9}, False),  # not measured
        ({"metric": "peak_memory_mb", "at_most": 2000}, True),
        ({"metric": "peak_memory_mb", "at_most": 800}, False),
    ],
)
def test_floors_and_ceilings(rule: dict[str, Any], passes: bool) -> None:
    candidate = evaluation()
    candidate.seconds_per_megapixel = {"bicubic": 0.1, "1 step": 1.5}
    candidate.peak_memory_mb = {"1 step": 900.0}
    assert decide(candidate, None, only(**rule)).passed is passes


def test_time_of_another_machine_is_told_and_not_compared() -> None:
    candidate, champion = evaluation(), evaluation()
    candidate.seconds_per_megapixel = {"1 step": 1.0}
    champion.seconds_per_megapixel = {"1 step": 0.5}
    ceiling = only(metric="seconds_per_megapixel", at_most=2)
    compared = only(metric="seconds_per_megapixel", not_worse_than="champion", by=0.6)
    candidate.machine = champion.machine = "A"
    assert decide(candidate, champion, compared).passed
    champion.seconds_per_megapixel = {"1 step": 0.3}
    assert not decide(candidate, champion, compared).passed
    champion.machine, champion.seconds_per_megapixel = "B", {"1 step": 9.0}
    for settings, passes in ((ceiling, True), (compared, False)):
        verdict = decide(candidate, champion, settings)
        assert verdict.passed is passes and "another machine (B)" in verdict.checks[-1].detail


def test_hard_pictures_must_pass_one_by_one() -> None:
    candidate, champion = evaluation(2.0), evaluation(1.0)
    candidate.scores["1 step"]["p3"].psnr_y -= 1.4  # 0.4 dB worse than the champion's
    rule = {"metric": "psnr_y", "not_worse_than": "champion", "pictures": ["p1", "p3"]}
    assert not decide(candidate, champion, only(**rule, by=0.3)).passed
    verdict = decide(candidate, champion, only(**rule, by=0.5))
    assert verdict.passed and verdict.checks[-1].value == pytest.approx(-0.4)
    assert verdict.checks[-1].pictures == pytest.approx({"p1": 1.0, "p3": -0.4})
    gone = decide(candidate, champion, only(**{**rule, "pictures": ["p1", "gone"]}))
    assert not gone.passed and "no picture gone" in gone.checks[-1].detail


def test_another_benchmark_is_refused_however_good() -> None:
    verdict = decide(evaluation(9.0), evaluation(1.0, benchmark="bench-2"), GateSettings())
    assert not verdict.passed
    assert result(verdict, "same benchmark as the champion") is False
    assert "bench-1" in verdict.to_markdown() and "bench-2" in verdict.to_markdown()
    assert result(verdict, "fidelity") is None


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
    old = {"passed": True, "checks": [{"name": "a", "passed": None, "detail": "b"}]}
    assert Verdict.from_json(json.dumps(old)).checks[0].name == "a"
    with pytest.raises(TeasrError, match="not a verdict"):
        Verdict.from_json("[]")


def test_rules_lie_over_the_built_in_ones() -> None:
    rules = gate(fidelity={"by": 0.2}, perception={"metric": "lpips", "at_most": 0.4}).rules
    assert list(rules) == list(DEFAULT_RULES)
    assert (rules["fidelity"].not_worse_than, rules["fidelity"].by) == ("champion", 0.2)
    # One that names its metric is whole: it takes nothing from the built-in one, such as optional.
    assert (rules["perception"].not_worse_than, rules["perception"].optional) == (None, False)
    assert "any-step" not in gate(any_step=None).rules
    settings = only(metric="niqe", at_most=9, pictures=["a"])
    assert list(settings.rules) == ["it"]
    assert GateSettings.from_mapping(settings.model_dump(mode="json"), "recipe.yaml") == settings


def test_a_gate_is_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(
        "confidence: 0.9\nrules:\n  floor: {metric: psnr_y, at_least: 24}\n  any-step: null\n"
    )
    settings = GateSettings.load(path, ["rules.floor.at_least=25", "rules.fidelity.by=1"])
    assert list(settings.rules) == ["better than bicubic", "fidelity", "perception", "floor"]
    assert (settings.rules["floor"].at_least, settings.rules["fidelity"].by) == (25, 1)


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"fidelity": {"by": -1}}, "rules.fidelity.by"),
        ({"fidelity": {"optionl": 1}}, "Did you mean 'optional'.*Known keys: at_least"),
        ({"x": {"at_least": 1}}, "rules.x.metric': Field required"),
        ({"x": {"metric": "psnr", "at_least": 1}}, "psnr_y, .*peak_memory_mb is expected"),
        ({"x": {"metric": "psnr_y"}}, "exactly one of at_least"),
        ({"x": {"metric": "psnr_y", "at_least": 1, "at_most": 2}}, "not at_least and at_most"),
        ({"x": {"metric": "psnr_y", "better_than": "me"}}, "champion, bicubic or a number"),
        ({"x": {"metric": "psnr_y", "better_than": "1 step"}}, "compared with itself"),
        ({"x": {"metric": "psnr_y", "at_least": 1, "by": 1}}, "by goes with"),
        (
            {"x": {"metric": "peak_memory_mb", "at_most": 1, "pictures": ["a"]}},
            "not measured picture by picture",
        ),
        (dict.fromkeys(DEFAULT_RULES), "at least one rule"),
        ({"a.b": {"metric": "psnr_y", "at_least": 1}}, "'a.b': letters"),
        (["fidelity"], "rules"),
    ],
)
def test_a_wrong_rule_is_named(rules: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        GateSettings.from_mapping({"rules": rules}, "gate.yaml")


def test_the_documented_gate_is_one() -> None:
    text = (Path(__file__).parents[1] / "docs" / "registry.md").read_text()
    block = text.split("```yaml\n")[1].split("```")[0]
    settings = GateSettings.from_mapping(yaml.safe_load(block), "docs/registry.md")
    assert settings.rules["hard ones"].pictures == ("street-001", "hair-007")
    for name, rule in DEFAULT_RULES.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert yaml.safe_load(line.split("`")[3]) == dict(rule)
