"""The promotion gate: may a candidate take the champion's place?

Models are compared picture by picture on one frozen benchmark. A comparison with the champion is a
test of non-inferiority: it passes when the confidence interval of the mean difference stays within
the allowed loss, so that a handful of pictures cannot carry a promotion by luck. Pure functions:
equal evaluations and settings give an equal verdict.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from teasr.config import Settings
from teasr.errors import TeasrError
from teasr.evaluation import BICUBIC, Evaluation, system_name
from teasr.metrics import Difference, paired_bootstrap

PSNR_CEILING = 100.0
"""dB. A picture restored without any error has infinite PSNR, which no mean survives."""

ONE_STEP = system_name(1)
FOUR_STEPS = system_name(4)


class GateSettings(Settings):
    """What a candidate must show. Gains and drops are in dB of PSNR-Y, LPIPS is a distance."""

    min_gain_over_bicubic_db: float = 0.0
    """Mean at one step must exceed bicubic's by more than this."""
    max_psnr_drop_db: float = Field(default=0.1, ge=0)
    """At one step, the candidate may lose this much against the champion."""
    max_lpips_rise: float = Field(default=0.01, ge=0)
    """At one step, LPIPS may rise this much above the champion's."""
    max_steps_drop_db: float = Field(default=0.5, ge=0)
    """Mean at four steps may lie this much below the mean at one step (any-step consistency)."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the intervals of the comparisons with the champion."""


@dataclass
class Check:
    """One rule applied.

    Attributes:
        name: the rule, for people.
        passed: None when the rule does not apply or its figures were not measured.
        detail: the figures and the limit, or why there are none.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass
class Verdict:
    """The gate's answer: `passed` unless one of the `checks` failed."""

    passed: bool
    checks: list[Check]

    def to_json(self) -> str:
        """Everything, readable back by `from_json`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """The inverse of `to_json`.

        Raises:
            TeasrError: when the text is not a verdict.
        """
        try:
            document: dict[str, Any] = json.loads(text)
            return cls(document["passed"], [Check(**check) for check in document["checks"]])
        except (ValueError, KeyError, TypeError):
            raise TeasrError("This is not a verdict written by teasr.") from None

    def to_markdown(self) -> str:
        """A table for people: check, result, detail."""
        result = {True: "passed", False: "**failed**", None: "not measured"}
        headline = "**Passed.**" if self.passed else "**Refused.**"
        lines = [headline, "", "| check | result | detail |", "|---|---|---|"]
        lines += [f"| {c.name} | {result[c.passed]} | {c.detail} |" for c in self.checks]
        return "\n".join(lines) + "\n"


def decide(
    candidate: Evaluation, champion: Evaluation | None, settings: GateSettings, seed: int = 0
) -> Verdict:
    """Apply every rule; the first champion (`champion` None) has only the candidate's own to pass.

    Args:
        seed: of the bootstrap draws.
    """
    checks = [_floor(candidate, settings), _step_consistency(candidate, settings)]
    if champion is not None:
        checks += _against_champion(candidate, champion, settings, seed)
    return Verdict(all(check.passed is not False for check in checks), checks)


def _floor(candidate: Evaluation, settings: GateSettings) -> Check:
    name = "better than bicubic"
    missing = [system for system in (ONE_STEP, BICUBIC) if not candidate.scores.get(system)]
    if missing:
        return Check(name, False, f"the candidate's evaluation lacks {' and '.join(missing)}")
    gain = _mean_psnr(candidate, ONE_STEP) - _mean_psnr(candidate, BICUBIC)
    limit = settings.min_gain_over_bicubic_db
    return Check(
        name,
        gain > limit,
        f"PSNR-Y {gain:+.3f} dB at {ONE_STEP}; more than {limit:+.3f} dB required",
    )


def _step_consistency(candidate: Evaluation, settings: GateSettings) -> Check:
    name = "more steps do not harm"
    missing = [system for system in (ONE_STEP, FOUR_STEPS) if not candidate.scores.get(system)]
    if missing:
        return Check(name, None, f"not evaluated at {' and '.join(missing)}")
    change = _mean_psnr(candidate, FOUR_STEPS) - _mean_psnr(candidate, ONE_STEP)
    limit = settings.max_steps_drop_db
    return Check(
        name,
        change >= -limit,
        f"PSNR-Y {change:+.3f} dB from {ONE_STEP} to {FOUR_STEPS}; "
        f"at least {-limit:+.3f} dB required",
    )


def _against_champion(
    candidate: Evaluation, champion: Evaluation, settings: GateSettings, seed: int
) -> list[Check]:
    names = "PSNR-Y no worse than the champion", "LPIPS no worse than the champion"
    obstacle = _incomparable(candidate, champion)
    if obstacle:
        return [
            Check("same benchmark as the champion", False, obstacle),
            *(Check(name, None, "not compared") for name in names),
        ]
    keys = list(candidate.scores[ONE_STEP])
    ours, theirs = candidate.scores[ONE_STEP], champion.scores[ONE_STEP]
    same = Check(
        "same benchmark as the champion", True, f"{candidate.benchmark}, {len(keys)} pictures"
    )
    psnr = paired_bootstrap(
        [_finite_psnr(ours[key].psnr_y) for key in keys],
        [_finite_psnr(theirs[key].psnr_y) for key in keys],
        seed,
        settings.confidence,
    )
    limit = settings.max_psnr_drop_db
    psnr_check = Check(
        names[0],
        psnr.low >= -limit,
        f"{_interval(psnr, settings, ' dB')}; at least {-limit:+.3f} dB required",
    )
    our_lpips = _measured(ours[key].lpips for key in keys)
    their_lpips = _measured(theirs[key].lpips for key in keys)
    if our_lpips is None or their_lpips is None:
        whose = "candidate" if our_lpips is None else "champion"
        return [same, psnr_check, Check(names[1], None, f"LPIPS of the {whose} was not measured")]
    lpips = paired_bootstrap(our_lpips, their_lpips, seed, settings.confidence)
    lpips_check = Check(
        names[1],
        lpips.high <= settings.max_lpips_rise,
        f"{_interval(lpips, settings)}; at most {settings.max_lpips_rise:+.3f} allowed",
    )
    return [same, psnr_check, lpips_check]


def _incomparable(candidate: Evaluation, champion: Evaluation) -> str | None:
    """Why the two cannot be compared picture by picture; None when they can."""
    if candidate.benchmark != champion.benchmark:
        return (
            f"the candidate was evaluated on {candidate.benchmark}, the champion on "
            f"{champion.benchmark}; evaluate both on one benchmark"
        )
    ours, theirs = candidate.scores.get(ONE_STEP), champion.scores.get(ONE_STEP)
    if not ours or not theirs:
        whose = "champion" if ours else "candidate"
        return f"the {whose} was not evaluated at {ONE_STEP}"
    if set(ours) != set(theirs):
        return (
            f"{len(set(ours) ^ set(theirs))} pictures were evaluated for only one of the two; "
            "evaluate both on the whole benchmark"
        )
    return None


def _mean_psnr(evaluation: Evaluation, system: str) -> float:
    values = [_finite_psnr(value) for value in evaluation.values(system, "psnr_y")]
    return sum(values) / len(values)


def _finite_psnr(value: float) -> float:
    return min(value, PSNR_CEILING)


def _measured(values: Iterable[float | None]) -> list[float] | None:
    """The values, or None when one of them was not measured."""
    measured: list[float] = []
    for value in values:
        if value is None:
            return None
        measured.append(value)
    return measured


def _interval(difference: Difference, settings: GateSettings, unit: str = "") -> str:
    return (
        f"{difference.mean:+.3f}{unit}, {settings.confidence:.0%} interval "
        f"[{difference.low:+.3f}, {difference.high:+.3f}]{unit}"
    )
