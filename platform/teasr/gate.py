"""The promotion gate: may a candidate take the champion's place?

A gate is a set of named rules over the figures of one frozen benchmark. A comparison is made
picture by picture and judged by the confidence interval of the mean difference: *better* needs the
whole interval beyond the margin, *not worse* needs it within the margin, so that a handful of
pictures cannot carry a promotion by luck. Pure functions: equal evaluations and settings give an
equal verdict.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from teasr.config import Settings
from teasr.errors import TeasrError
from teasr.evaluation import BICUBIC, COSTS, LABELS, METRICS, Evaluation, system_name
from teasr.metrics import bootstrap_interval, paired_bootstrap

CHAMPION = "champion"
PSNR_CEILING = 100.0
"""dB. A picture restored without any error has infinite PSNR, which no mean survives."""
SAME_BENCHMARK = "same benchmark as the champion"
"""The check that comes by itself with every champion."""

_REQUIREMENTS = ("at_least", "at_most", "better_than", "not_worse_than")


class Rule(Settings):
    """What one figure of the candidate must be."""

    metric: str
    """A metric of pictures (`psnr_y`, `ssim_y`, `lpips`, ...), `seconds_per_megapixel` or
    `peak_memory_mb`."""
    steps: int = Field(1, ge=1, le=64)
    """Sampling steps at which the candidate is looked at."""
    at_least: float | None = None
    """Lowest mean. Give exactly one of these four."""
    at_most: float | None = None
    """Highest mean."""
    better_than: str | None = None
    """`champion` at the same steps, `bicubic`, or the candidate itself at `N steps`: the whole
    interval of the difference must be beyond `by`."""
    not_worse_than: str | None = None
    """As `better_than`, but the whole interval must be within `by` of it, or better."""
    by: float = Field(0.0, ge=0)
    """Margin of a comparison, in the metric's unit."""
    pictures: tuple[str, ...] = ()
    """Keys of pictures of the benchmark that must pass one by one; none: all by their mean."""
    optional: bool = False
    """Passed over when a figure that it needs was not measured, in place of failing."""

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METRICS and value not in COSTS:
            raise ValueError(f"one of {', '.join((*METRICS, *COSTS))} is expected")
        return value

    @field_validator("better_than", "not_worse_than")
    @classmethod
    def _opponent(cls, value: str | None) -> str | None:
        if value is None or value in (CHAMPION, BICUBIC):
            return value
        count = re.fullmatch(r"([1-9]\d?) steps?", value)
        if count is None:
            raise ValueError("champion, bicubic or a number of steps such as '1 step' is expected")
        return system_name(int(count[1]))

    @model_validator(mode="after")
    def _fits(self) -> Rule:
        given = [name for name in _REQUIREMENTS if getattr(self, name) is not None]
        if len(given) != 1:
            named = f", not {' and '.join(given)}" if given else ""
            raise ValueError(f"exactly one of {', '.join(_REQUIREMENTS)} is expected{named}")
        if self.by and self.opponent is None:
            raise ValueError(f"by goes with better_than and not_worse_than, not with {given[0]}")
        if self.opponent == self.system:
            raise ValueError(f"{self.system} cannot be compared with itself; set steps")
        if self.pictures and self.metric in COSTS:
            raise ValueError(f"{self.metric} is not measured picture by picture")
        return self

    @property
    def opponent(self) -> str | None:
        """What the candidate is compared with; None for a limit."""
        return self.better_than or self.not_worse_than

    @property
    def system(self) -> str:
        """The candidate's name in evaluations."""
        return system_name(self.steps)

    @property
    def label(self) -> str:
        """The metric, for people, and the steps."""
        return f"{LABELS[self.metric][0]} at {self.system}"

    @property
    def meaning(self) -> str:
        """The rule in words."""
        each = f", each of {', '.join(self.pictures)}" if self.pictures else ""
        return f"{self.label}: {self._asked}{each}"

    @property
    def _asked(self) -> str:
        if self.at_least is not None:
            return f"at least {self._exactly(self.at_least)}"
        if self.at_most is not None:
            return f"at most {self._exactly(self.at_most)}"
        whom = "the champion" if self.opponent == CHAMPION else str(self.opponent)
        wanted = "better" if self.better_than else "not worse"
        return f"{wanted} than {whom}" + (
            f" by more than {self._exactly(self.by)}" if self.by else ""
        )

    @property
    def limit(self) -> float:
        """Of the figure, or of the difference to the opponent: its lowest value where
        `is_lower_limit`, else its highest."""
        if self.at_least is not None:
            return self.at_least
        if self.at_most is not None:
            return self.at_most
        gain = self.by if self.better_than else -self.by
        return (gain if self.is_lower_limit else -gain) + 0.0  # never -0.0

    @property
    def is_lower_limit(self) -> bool:
        """Whether a figure must not fall below `limit`, as opposed to rise above it."""
        if self.opponent is None:
            return self.at_least is not None
        return METRICS.get(self.metric) == "higher"

    def allows(self, low: float, high: float) -> bool:
        """Whether figures, or differences, from `low` to `high` are on the right side of `limit`;
        on it is enough but for `better_than`."""
        margin = low - self.limit if self.is_lower_limit else self.limit - high
        return bool(margin > 0 if self.better_than else margin >= 0)

    @property
    def bound(self) -> str:
        """`limit` for people: `≥ -0.1 dB`."""
        sign = "≥" if self.is_lower_limit else "≤"
        if self.better_than is not None:
            sign = ">" if self.is_lower_limit else "<"
        return f"{sign} {self._exactly(self.limit)}"

    def show(self, value: float) -> str:
        """A figure of this metric, or where there is an opponent a difference, with its unit."""
        _, unit, digits = LABELS[self.metric]
        text = f"{value:.{digits}f}" if self.opponent is None else f"{value:+.{digits + 1}f}"
        return f"{text} {unit}".rstrip()

    def _exactly(self, value: float) -> str:
        return f"{value:g} {LABELS[self.metric][1]}".rstrip()


DEFAULT_RULES: Mapping[str, Mapping[str, Any]] = {
    "better than bicubic": {"metric": "psnr_y", "better_than": BICUBIC},
    "fidelity": {"metric": "psnr_y", "not_worse_than": CHAMPION, "by": 0.1},
    "perception": {
        "metric": "lpips", "not_worse_than": CHAMPION, "by": 0.01, "optional": True
    },
    "any-step": {
        "metric": "psnr_y", "steps": 4, "not_worse_than": "1 step", "by": 0.5, "optional": True
    },
}  # fmt: skip
"""The rules of a gate that says nothing else."""


class GateSettings(Settings):
    """What a candidate must show."""

    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the intervals."""
    rules: dict[str, Rule] = Field(default_factory=dict)
    """By name (letters, digits, spaces, - and _), laid over `DEFAULT_RULES`. One that names its
    metric stands for itself, another changes the values of the rule of its name, and null leaves
    that rule out."""

    @model_validator(mode="before")
    @classmethod
    def _over_the_defaults(cls, data: Any) -> Any:
        given = data.get("rules", {}) if isinstance(data, Mapping) else None
        if not isinstance(given, Mapping):
            return data  # told as a wrong type
        rules: dict[str, Any] = {**DEFAULT_RULES, **given}
        for name, rule in given.items():
            if isinstance(rule, Mapping) and "metric" not in rule and name in DEFAULT_RULES:
                rules[name] = {**DEFAULT_RULES[name], **rule}
        return {**data, "rules": {name: rule for name, rule in rules.items() if rule is not None}}

    @field_validator("rules")
    @classmethod
    def _some_with_names(cls, value: dict[str, Rule]) -> dict[str, Rule]:
        if not value:
            raise ValueError("at least one rule is expected: a gate without any would pass all")
        for name in value:
            if not re.fullmatch(
                r"\w[\w -]*", name
            ):  # overrides split at dots, MLflow knows no others
                raise ValueError(f"'{name}': letters, digits, spaces, - and _ make a rule's name")
        return value

    @field_serializer("rules", mode="wrap")
    def _with_those_left_out(
        self, rules: dict[str, Rule], handler: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        """So that what is written is read back as it is."""
        return {**dict.fromkeys(DEFAULT_RULES), **handler(rules)}


@dataclass
class Check:
    """One rule applied.

    Attributes:
        name: the rule's.
        passed: None when it does not count: what it needs was not measured, and it is optional, or
            the champion was not comparable, which fails a check of its own.
        detail: the figures and the limit, or why there are none; for people.
        rule: the rule in words.
        metric: it is about; None for the benchmark's check.
        value: the mean, or the mean difference to what it is compared with; the worst of named
            pictures. None without figures.
        low, high: interval of `value`, where there is one.
        limit: of `value`.
        pictures: figure, or difference, of each named picture.
    """

    name: str
    passed: bool | None
    detail: str
    rule: str = ""
    metric: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    pictures: dict[str, float] = field(default_factory=dict)


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
        """The inverse of `to_json`; verdicts of earlier releases have fewer figures.

        Raises:
            TeasrError: when the text is not a verdict.
        """
        try:
            document: dict[str, Any] = json.loads(text)
            return cls(document["passed"], [Check(**check) for check in document["checks"]])
        except (ValueError, KeyError, TypeError):
            raise TeasrError("This is not a verdict written by teasr.") from None

    def to_markdown(self) -> str:
        """A table for people: rule, result, detail."""
        result = {True: "passed", False: "**failed**", None: "not measured"}
        headline = "**Passed.**" if self.passed else "**Refused.**"
        lines = [headline, "", "| rule | result | detail |", "|---|---|---|"]
        lines += [f"| {c.name} | {result[c.passed]} | {c.detail} |" for c in self.checks]
        return "\n".join(lines) + "\n"


def decide(
    candidate: Evaluation, champion: Evaluation | None, settings: GateSettings, seed: int = 0
) -> Verdict:
    """Apply every rule; those that compare with the champion do not apply to the first one
    (`champion` None).

    Args:
        seed: of the bootstrap draws.
    """
    checks = []
    obstacle = None
    if champion is not None:
        obstacle = _incomparable(candidate, champion)
        found = f"{len(_keys(candidate))} pictures of {candidate.benchmark[:12]}"
        words = "both were measured on the same pictures"
        checks.append(Check(SAME_BENCHMARK, obstacle is None, obstacle or found, words))
    for name, rule in settings.rules.items():
        if rule.opponent == CHAMPION and champion is None:
            continue
        check = Check(name, None, "not compared", rule.meaning, rule.metric, limit=rule.limit)
        if not (rule.opponent == CHAMPION and obstacle):
            _apply(check, rule, candidate, champion, settings.confidence, seed)
        checks.append(check)
    return Verdict(all(check.passed is not False for check in checks), checks)


class _NotMeasuredError(Exception):
    """Why a rule has no figures to judge by."""


def _apply(
    check: Check,
    rule: Rule,
    candidate: Evaluation,
    champion: Evaluation | None,
    confidence: float,
    seed: int,
) -> None:
    """Fill in `check` by `rule`."""
    try:
        if rule.metric in COSTS:
            _judge_cost(check, rule, candidate, champion)
        elif rule.pictures:
            _judge_pictures(check, rule, candidate, champion)
        else:
            _judge_mean(check, rule, candidate, champion, confidence, seed)
    except _NotMeasuredError as reason:
        check.passed, check.detail = None if rule.optional else False, str(reason)


def _judge_mean(
    check: Check,
    rule: Rule,
    candidate: Evaluation,
    champion: Evaluation | None,
    confidence: float,
    seed: int,
) -> None:
    ours = _values(rule, candidate, rule.system)
    numbers = list(ours.values())
    if rule.opponent is None:
        check.value = statistics.fmean(numbers)
        check.low, check.high = bootstrap_interval(numbers, seed, confidence)
        check.passed = rule.allows(check.value, check.value)
    else:
        theirs = _opponent_values(rule, candidate, champion)
        found = paired_bootstrap(numbers, [theirs[key] for key in ours], seed, confidence)
        check.value, check.low, check.high = found.mean, found.low, found.high
        check.passed = rule.allows(found.low, found.high)
    interval = f"{rule.show(check.low)} to {rule.show(check.high)}"
    check.detail = f"{rule.meaning}; {rule.show(check.value)}, {confidence:.0%} interval {interval}"


def _judge_pictures(
    check: Check, rule: Rule, candidate: Evaluation, champion: Evaluation | None
) -> None:
    ours = _values(rule, candidate, rule.system)
    theirs: dict[str, float] = (
        {} if rule.opponent is None else _opponent_values(rule, candidate, champion)
    )
    check.pictures = {key: ours[key] - theirs.get(key, 0.0) for key in rule.pictures}
    figures = check.pictures.values()
    check.value = min(figures) if rule.is_lower_limit else max(figures)
    check.passed = rule.allows(check.value, check.value)
    each = ", ".join(f"{key} {rule.show(figure)}" for key, figure in check.pictures.items())
    check.detail = f"{rule.meaning}; {each}"


def _judge_cost(
    check: Check, rule: Rule, candidate: Evaluation, champion: Evaluation | None
) -> None:
    elsewhere = ""
    if champion is not None and champion.machine != candidate.machine:
        elsewhere = f"the champion's was measured on another machine ({champion.machine or '?'})"
    check.value = _cost(rule, candidate, rule.system)
    if rule.opponent == CHAMPION:
        assert champion is not None
        if elsewhere:
            raise _NotMeasuredError(elsewhere)
        check.value -= _cost(rule, champion, rule.system, "champion")
    elif rule.opponent is not None:
        check.value -= _cost(rule, candidate, rule.opponent)
    check.passed = rule.allows(check.value, check.value)
    where = f" on {candidate.machine}" if candidate.machine else ""
    parts = (rule.meaning, rule.show(check.value) + where, elsewhere)
    check.detail = "; ".join(part for part in parts if part)


def _incomparable(candidate: Evaluation, champion: Evaluation) -> str | None:
    """Why the two cannot be compared picture by picture; None when they can."""
    if candidate.benchmark != champion.benchmark:
        return (
            f"the candidate was evaluated on {candidate.benchmark}, the champion on "
            f"{champion.benchmark}; evaluate both on one benchmark"
        )
    others = _keys(candidate) ^ _keys(champion)
    if others:
        return (
            f"{len(others)} pictures were evaluated for only one of the two; "
            "evaluate both on the whole benchmark"
        )
    return None


def _keys(evaluation: Evaluation) -> set[str]:
    return set().union(*evaluation.scores.values())


def _opponent_values(
    rule: Rule, candidate: Evaluation, champion: Evaluation | None
) -> dict[str, float]:
    if rule.opponent == CHAMPION:
        assert champion is not None
        return _values(rule, champion, rule.system, "champion")
    assert rule.opponent is not None
    return _values(rule, candidate, rule.opponent)


def _values(
    rule: Rule, evaluation: Evaluation, system: str, whose: str = "candidate"
) -> dict[str, float]:
    """The metric of the rule's pictures by key, all finite."""
    scores = evaluation.scores.get(system)
    if not scores:
        raise _NotMeasuredError(f"the {whose}'s evaluation lacks {system}")
    unknown = [key for key in rule.pictures if key not in scores]
    if unknown:
        raise _NotMeasuredError(f"the benchmark has no picture {', '.join(unknown)}")
    found = {key: getattr(scores[key], rule.metric) for key in rule.pictures or scores}
    if any(value is None for value in found.values()):
        name = LABELS[rule.metric][0]
        raise _NotMeasuredError(f"{name} of the {whose} at {system} was not measured")
    return {key: min(value, PSNR_CEILING) for key, value in found.items()}


def _cost(rule: Rule, evaluation: Evaluation, system: str, whose: str = "candidate") -> float:
    found: float | None = getattr(evaluation, rule.metric).get(system)
    if found is None:
        name = LABELS[rule.metric][0]
        raise _NotMeasuredError(f"{name} of the {whose} at {system} was not measured")
    return found
