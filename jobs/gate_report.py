"""The gate's report: one page that a person reads in a minute before a version goes live.

Verdict, rules, means with intervals, a dot for every picture, and the worst and best pictures under
sliders. Only the pictures that are shown are restored again; where the benchmark cannot be read, or
a model cannot be loaded, the page says so and has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jobs.figures import ORIGINAL, cut_for_page, directed_heading, figure, mean_and_interval
from teasr import lineage, promotion, registry
from teasr.backbones import load_model
from teasr.errors import TeasrError
from teasr.evaluation import BICUBIC, CONFIDENCE, DRAWS, LABELS, METRICS, Evaluation, system_name
from teasr.gallery import Figures, Ruling, Scene, verdict_page
from teasr.gate import CHAMPION, PSNR_CEILING, Check, GateSettings, Rule, Verdict, decide
from teasr.images import Bytes, decode, encode
from teasr.plots import Point, Scatter
from teasr.promotion import Contest, Promotion
from teasr.restoration import RestorationSettings, restore
from teasr.shards import join_url, read_manifest, read_shard

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOW_RESOLUTION = "low resolution"
EXTREMES = 2
"""Pictures that are shown from either end."""
CUT = 384
"""Longest side of what is shown of a picture, in HR pixels: the page holds five of each."""
_JUDGED = system_name(1)


@dataclass(frozen=True)
class Report:
    """The page, and what it lacks.

    Attributes:
        html: the whole page.
        no_pictures: why it shows none; empty when it does.
    """

    html: str
    no_pictures: str


def draw(
    client: MlflowClient,
    name: str,
    between: Contest,
    gate: GateSettings,
    benchmark: str | None = None,
) -> Report:
    """The report of what the gate says `between` two versions of `name`; nothing is changed.

    Args:
        benchmark: URL of the pair dataset that both were measured on; default: where it was when
            the candidate was registered.

    Raises:
        UsageError: for an unknown model or version.
        TeasrError: when a version has no evaluation, or the candidate's weights are not those that
            were logged.
    """
    version = registry.version_of(client, name, between.version)
    candidate, champion = registry.required_evaluation(client, version), None
    if between.champion is not None:
        other = registry.version_of(client, name, between.champion)
        champion = registry.required_evaluation(client, other)
    # What was changed since it was logged, or cannot be fetched, must not go live.
    registry.resolve(f"models:/{name}/{between.version}", client)
    sides = _Sides(name, between, candidate, champion)
    chosen = _choose(sides, gate)
    scenes: list[Scene] = []
    missing = ""
    try:
        where = benchmark or version.tags.get("teasr.benchmark_location")
        if not where:
            raise TeasrError("it is not known where the benchmark is.", "Give --benchmark DIR.")
        scenes = _scenes(client, sides, chosen, _pairs(where, candidate.benchmark, chosen))
    except (TeasrError, OSError) as error:
        missing = str(error)
    return Report(_page(sides, decide(candidate, champion, gate), gate, scenes, missing), missing)


def promote(
    client: MlflowClient,
    name: str,
    version: int | None = None,
    gate: GateSettings | None = None,
    benchmark: str | None = None,
    dry_run: bool = False,
    by: str | None = None,
) -> tuple[Promotion, Report]:
    """`teasr.promotion.promote` with the report: drawn before anything moves, an artifact of the
    candidate's training run, named in the record. Pages of the versions are brought up to date.

    Args:
        benchmark: as of `draw`.
        dry_run: draw the report and change nothing.
        by: who promotes; default: the user of this process.
    """
    gate = gate or GateSettings()
    between = promotion.contest(client, name, version)
    report = draw(client, name, between, gate, benchmark)
    if dry_run:
        return promotion.promote(client, name, gate=gate, dry_run=True, between=between), report
    uri = log(client, name, between, report)
    outcome = promotion.promote(client, name, gate=gate, by=by, report=uri, between=between)
    lineage.describe(client, name, outcome.version, outcome.replaced)
    return outcome, report


def log(client: MlflowClient, name: str, between: Contest, report: Report) -> str | None:
    """Make the page an artifact of the candidate's training run.

    Returns:
        Its URI; None when the version has no run.
    """
    run_id = registry.version_of(client, name, between.version).run_id
    if not run_id:
        return None
    path = f"gate/version-{between.version}-against-{between.champion or 'none'}.html"
    client.log_text(run_id, report.html, path)
    return f"runs:/{run_id}/{path}"


@dataclass(frozen=True)
class _Sides:
    """The two that are compared."""

    name: str
    between: Contest
    candidate: Evaluation
    champion: Evaluation | None

    @property
    def ours(self) -> str:
        return f"version {self.between.version}"

    @property
    def theirs(self) -> str:
        """The champion; before the first one bicubic."""
        champion = self.between.champion
        return BICUBIC if champion is None else f"champion (version {champion})"

    @property
    def comparable(self) -> bool:
        """Whether there is a champion that was measured on the same benchmark."""
        return self.champion is not None and self.champion.benchmark == self.candidate.benchmark

    def our_figures(self, system: str, metric: str) -> dict[str, float]:
        """By picture; those that were measured."""
        return _figures(self.candidate, system, metric)

    def their_figures(self, system: str, metric: str) -> dict[str, float]:
        if self.champion is None:
            return _figures(self.candidate, BICUBIC, metric)
        return _figures(self.champion, system, metric) if self.comparable else {}


def _figures(evaluation: Evaluation, system: str, metric: str) -> dict[str, float]:
    scores = evaluation.scores.get(system, {})
    found = {key: getattr(score, metric) for key, score in scores.items()}
    return {key: min(value, PSNR_CEILING) for key, value in found.items() if value is not None}


# ---------------------------------------------------------------- pictures


def _choose(sides: _Sides, gate: GateSettings) -> dict[str, str]:
    """The pictures to show and why: those that rules name, the worst, the best."""
    figures, unit = sides.our_figures(_JUDGED, "psnr_y"), "{:.2f} dB"
    if sides.comparable:
        theirs = sides.their_figures(_JUDGED, "psnr_y")
        figures = {key: figures[key] - theirs[key] for key in figures if key in theirs}
        unit = "{:+.2f} dB against the champion"
    ranked = sorted(figures, key=lambda key: (figures[key], key))
    named = [key for rule in gate.rules.values() for key in rule.pictures if key in figures]
    best = [key for key in reversed(ranked[-EXTREMES:]) if key not in ranked[:EXTREMES]]
    why = {
        **dict.fromkeys(named, "named in a rule"),
        **dict.fromkeys(ranked[:EXTREMES], "one of the worst"),
        **dict.fromkeys(best, "one of the best"),
    }
    return {key: f"{reason}: {unit.format(figures[key])}" for key, reason in why.items()}


def _pairs(where: str, fingerprint: str, keys: Mapping[str, str]) -> dict[str, tuple[Bytes, Bytes]]:
    """LR and HR, both (H, W, 3), of the pairs `keys`.

    Raises:
        UsageError: when there is no pair dataset.
        TeasrError: when it is another one than was measured on, or a shard is damaged.
    """
    manifest = read_manifest(where, "pairs")
    if manifest.fingerprint != fingerprint:
        raise TeasrError(
            f"the pairs in {where} are {manifest.fingerprint}, and {fingerprint} was measured on."
        )
    found: dict[str, tuple[Bytes, Bytes]] = {}
    for shard in manifest.shards:
        if len(found) == len(keys):
            break
        for sample in read_shard(join_url(where, shard.name), kind="pairs"):
            if sample.key in keys:
                lr, hr = (decode(sample.members[name]).rgb for name in ("lr.png", "hr.png"))
                found[sample.key] = lr, hr
    return found


def _scenes(
    client: MlflowClient,
    sides: _Sides,
    chosen: Mapping[str, str],
    pairs: Mapping[str, tuple[Bytes, Bytes]],
) -> list[Scene]:
    restored = {sides.ours: _restored(client, sides.name, sides.between.version, pairs)}
    if sides.between.champion is not None:
        theirs = _restored(client, sides.name, sides.between.champion, pairs)
        restored = {sides.theirs: theirs, **restored}
    scenes = []
    for key, why in chosen.items():
        lr, hr = pairs[key]
        scale = hr.shape[0] // lr.shape[0]
        pictures = {
            LOW_RESOLUTION: np.repeat(np.repeat(lr, scale, axis=0), scale, axis=1),
            **{who: by_key[key] for who, by_key in restored.items()},
            ORIGINAL: hr,
        }
        encoded = {name: encode(picture) for name, picture in pictures.items()}
        size, encoded, note = cut_for_page(encoded, CUT)
        scenes.append(Scene(key, size, encoded, _scene_figures(sides, key), f"{why}; {note}"))
    return scenes


def _restored(
    client: MlflowClient, name: str, version: int, pairs: Mapping[str, tuple[Bytes, Bytes]]
) -> dict[str, Bytes]:
    """The pictures by one version in one step, which is then out of memory again."""
    model = load_model(registry.resolve(f"models:/{name}/{version}", client))
    settings = RestorationSettings(steps=1)
    return {
        key: restore(model.network, lr, settings, codec=model.codec)
        for key, (lr, _) in pairs.items()
    }


def _scene_figures(sides: _Sides, key: str) -> Figures:
    metrics = sides.candidate.measured()
    rows = {
        who: [figure(metric, found(_JUDGED, metric).get(key)) for metric in metrics]
        for who, found in ((sides.theirs, sides.their_figures), (sides.ours, sides.our_figures))
    }
    return Figures([directed_heading(metric) for metric in metrics], rows)


# ---------------------------------------------------------------- the page


def _page(
    sides: _Sides, verdict: Verdict, gate: GateSettings, scenes: list[Scene], missing: str
) -> str:
    dots = [plot for plot in _scatters(sides, gate) if len(plot)]
    by = f"the difference of PSNR-Y to the {CHAMPION}" if sides.comparable else "PSNR-Y"
    about_scenes = (
        f"At {_JUDGED}, chosen by {by}. Move over a picture, or drag, to compare; the buttons "
        "choose what is compared. Figures are of the whole picture."
    )
    left = LOW_RESOLUTION if sides.champion is None else sides.theirs
    return verdict_page(
        f"{sides.name}: {sides.ours} against {sides.theirs}",
        verdict.passed,
        _sentences(sides, verdict),
        _facts(sides, gate),
        [_ruling(check, gate) for check in verdict.checks],
        _means(sides),
        "Means over the pictures; ↑ more is better, ↓ less is better. Below each mean its "
        f"{CONFIDENCE:.0%} interval: {DRAWS:,} bootstrap resamples of the pictures. Rules compare "
        "picture by picture, which tells smaller differences than these intervals do.",
        dots,
        f"Each dot is a picture; on the dashed line {sides.ours} and {sides.theirs} are equal. "
        "A dot under the pointer tells its name.",
        scenes,
        about_scenes if scenes else f"None are shown: {missing}",
        (left, sides.ours),
    )


def _sentences(sides: _Sides, verdict: Verdict) -> list[str]:
    champion = sides.between.champion
    if not verdict.passed and champion is None:
        headline = "Refused: there is no champion yet."
    elif not verdict.passed:
        headline = f"Refused: version {champion} stays the champion."
    elif champion is None:
        headline = f"Passed: {sides.ours} may become the first champion."
    else:
        headline = f"Passed: {sides.ours} may take the place of version {champion}."
    by_result = {
        result: [check.name for check in verdict.checks if check.passed is result]
        for result in (False, True, None)
    }
    words = {False: "Failed", True: "Passed", None: "Without figures, and not counted"}
    found = [f"{words[key]}: {', '.join(names)}." for key, names in by_result.items() if names]
    if champion is None:
        found.append("Rules that compare with the champion do not apply to the first one.")
    return [headline, *found]


def _facts(sides: _Sides, gate: GateSettings) -> dict[str, str]:
    ours = sides.candidate
    facts = {
        "benchmark": f"{ours.benchmark}, {len(ours.scores.get(BICUBIC, {}))} pictures",
        "confidence": f"{gate.confidence:.0%}",
        "measured on": ours.machine,
    }
    if sides.champion is not None and sides.champion.machine != ours.machine:
        facts[f"{sides.theirs} measured on"] = sides.champion.machine or "unknown"
    return {name: fact for name, fact in facts.items() if fact}


def _ruling(check: Check, gate: GateSettings) -> Ruling:
    rule = gate.rules.get(check.name)
    if rule is None or check.value is None:
        return Ruling(
            check.name, check.rule, check.detail, rule.bound if rule else "", check.passed
        )
    lines = [rule.show(check.value)]
    if check.low is not None and check.high is not None:
        lines.append(f"{rule.show(check.low)} to {rule.show(check.high)}")
    lines += [f"{key}: {rule.show(value)}" for key, value in check.pictures.items()]
    return Ruling(check.name, check.rule, "\n".join(lines), rule.bound, check.passed)


def _means(sides: _Sides) -> Figures:
    evaluations = [(sides.ours, sides.candidate)]
    if sides.champion is not None:
        evaluations.append((sides.theirs, sides.champion))
    measured = {metric for _, evaluation in evaluations for metric in evaluation.measured()}
    metrics = [metric for metric in METRICS if metric in measured]

    def row(evaluation: Evaluation, system: str) -> list[str]:
        cells = ["\n".join(mean_and_interval(evaluation, system, name)) for name in metrics]
        costs = evaluation.seconds_per_megapixel, evaluation.peak_memory_mb
        return cells + [
            f"{of[system]:.{digits}f}" if system in of else "not measured"
            for of, digits in zip(costs, (2, 0))
        ]

    rows = {BICUBIC: row(sides.candidate, BICUBIC)} if BICUBIC in sides.candidate.scores else {}
    for system in [system for system in sides.candidate.scores if system != BICUBIC]:
        for who, evaluation in reversed(evaluations):
            if system in evaluation.scores:
                rows[f"{who}, {system}"] = row(evaluation, system)
    return Figures([*map(directed_heading, metrics), "s / megapixel", "MB"], rows)


def _scatters(sides: _Sides, gate: GateSettings) -> list[Scatter]:
    """One for each metric that a rule compares with the champion; before the first one, with
    bicubic."""
    opponent = BICUBIC if sides.champion is None else CHAMPION
    compared: dict[tuple[str, str], Rule] = {
        (rule.metric, rule.system): rule
        for rule in gate.rules.values()
        if rule.opponent == opponent and rule.metric in METRICS
    }
    plots = []
    for (metric, system), rule in compared.items():
        ours, theirs = sides.our_figures(system, metric), sides.their_figures(system, metric)
        points = [Point(theirs[key], ours[key], key) for key in ours if key in theirs]
        unit = LABELS[metric][1]
        title = f"{rule.label}, {unit}" if unit else rule.label
        plots.append(Scatter(title, sides.theirs, sides.ours, points, METRICS[metric]))
    return plots
