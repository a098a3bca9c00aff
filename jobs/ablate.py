"""`teasr ablate`: what each part of the method is worth, variant by variant, at one budget.

A variant is a recipe in `recipes/ablations/` that extends `base` by what it changes. All variants
go on from one start, which pixel terms and flow matching have made (`start.yaml`); a variant whose
network has another shape gets a start of its own, by the same recipe and budget. From there each
has the same optimizer steps, so that a busy machine changes no figure; what a variant costs is told
beside them. With minutes given, the time is equal instead, and the pairs seen are told.

Every variant and seed is an ordinary distillation and evaluation with a run in MLflow (tags
`ablation` and `seed`). What is finished is kept: the same command goes on after an interruption,
and other seeds or variants in the same folder add to its table.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jobs.distill import Distilled, distill
from jobs.evaluate import evaluate
from jobs.recipe import RECIPES, Recipe, load_recipe
from jobs.steps import Steps
from jobs.training import MODEL_FOLDER
from teasr import tracking
from teasr.backbones import DiTSettings, DualBranchDiT
from teasr.errors import UsageError
from teasr.evaluation import BICUBIC, system_name
from teasr.restoration import RestorationSettings
from teasr.shards import absolute_url, read_manifest, write_bytes

FOLDER = "ablations"
START = "start"
FULL = "full"
MARKDOWN_FILE = "ablations.md"
CSV_FILE = "ablations.csv"
SETTINGS_FILE = "ablation.json"
METRICS = {
    "psnr_y": ("PSNR-Y in dB ↑", 2),
    "ssim_y": ("SSIM-Y ↑", 4),
    "lpips": ("LPIPS ↓", 4),
    "niqe": ("NIQE ↓", 2),
}
"""What is measured, with headings and digits after the point."""
EVEN = ", even levels"
"""Suffix of a system whose sampling levels are evenly spread, not kept near noise."""


@dataclass(frozen=True)
class Budget:
    """What all variants of a folder have in common."""

    data: str
    """HR dataset to learn from."""
    pairs: str
    """Pair dataset to measure on."""
    minutes: float | None = None
    """Training time of each variant, in place of the recipe's steps."""
    start_minutes: float | None = None
    """Training time of each start, in place of the recipe's steps."""
    overrides: tuple[str, ...] = ()
    """Changes to `base.yaml`, beneath what variants change; those of `training` lie over all."""


@dataclass(frozen=True)
class Plan:
    """One training: a variant with a seed, or a start."""

    name: str
    variant: str
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Outcome:
    """What one training came to."""

    variant: str
    seed: int
    parameters: int
    """Weights of the network that is kept."""
    held: int
    """Weights in training: those of all networks, and of the averages of those that train."""
    steps: int
    samples: int
    seconds: float
    peak_mb: float
    figures: dict[str, dict[str, float | None]]
    """Mean over the benchmark by system (`bicubic`, `4 steps`, ...) and metric."""

    @property
    def samples_per_second(self) -> float:
        """Pairs trained on per second."""
        return self.samples / max(self.seconds, 1e-9)


def variants() -> list[str]:
    """Variants that ship with the package, the full method first."""
    names = {path.stem for path in (RECIPES / FOLDER).glob("*.yaml")} - {"base", START, FULL}
    return [FULL, *sorted(names)]


def plan(budget: Budget, folder: Path, only: Sequence[str], seeds: Iterable[int]) -> list[Plan]:
    """The trainings that `only` (default: all variants) and `seeds` ask for, starts first.

    Raises:
        UsageError: an unknown variant, or a wrong field of a recipe.
    """
    names = list(dict.fromkeys(only)) or variants()
    unknown = [name for name in names if name not in variants()]
    if unknown:
        raise UsageError(f"There is no variant '{unknown[0]}'.", f"Known: {', '.join(variants())}.")
    base = _load(START, budget, budget.start_minutes)
    starts = {base.backbone_settings: Plan(START, START, 0, base)}
    trainings = []
    for name in names:
        init = str(folder / "runs" / START / MODEL_FOLDER)
        shape = _load(name, budget, budget.minutes, init=init).backbone_settings
        if shape not in starts:
            own = f"{START}-{name}"
            recipe = base.model_copy(update={"backbone": shape})
            starts[shape] = Plan(own, own, 0, recipe)
        init = str(folder / "runs" / starts[shape].name / MODEL_FOLDER)
        for seed in dict.fromkeys(seeds):
            # The start has read the stream of seed 0.
            drawn = [f"training.seed={seed}", f"feed.seed={seed + 1}"]
            recipe = _load(name, budget, budget.minutes, drawn, init=init)
            trainings.append(Plan(f"{name}-seed{seed}", name, seed, recipe))
    used = {training.recipe.backbone_settings for training in trainings}
    return [*(start for shape, start in starts.items() if shape in used), *trainings]


def ablate(
    budget: Budget, folder: Path, only: Sequence[str] = (), seeds: Iterable[int] = (0,)
) -> list[Outcome]:
    """Train and measure what `plan` lists, in `folder`, and write its table.

    Returns:
        All outcomes in `folder`, those of earlier commands too.

    Raises:
        UsageError: as `plan`; no datasets; or a folder with ablations of another budget.
        TeasrError: when a training or an evaluation fails.
    """
    # Ray's workers may have another working folder.
    budget = replace(budget, data=absolute_url(budget.data), pairs=absolute_url(budget.pairs))
    trainings = plan(budget, folder, only, seeds)
    data = read_manifest(budget.data, kind="hr").fingerprint
    pairs = read_manifest(budget.pairs, kind="pairs").fingerprint
    _check_folder(folder, {**asdict(budget), "data": data, "pairs": pairs})
    client = tracking.connect()
    steps = Steps(folder / "steps")
    for training in trainings:
        recipe = training.recipe

        def work(training: Plan = training, recipe: Recipe = recipe) -> dict[str, Any]:
            trained = distill(recipe, folder / "runs" / training.name)
            figures = _measure(recipe, budget.pairs, trained.model, folder, training.name)
            outcome = _outcome(training, trained, figures)
            _record(client, trained.run_id, outcome)
            return {**asdict(outcome), "summary": _summary(outcome)}

        inputs = {"recipe": recipe.model_dump(mode="json"), "data": data, "pairs": pairs}
        steps.run(training.name, inputs, work)
        outcomes = _kept(steps)  # the table grows with each
        write_bytes(str((folder / MARKDOWN_FILE).absolute()), markdown(outcomes).encode())
        write_bytes(str((folder / CSV_FILE).absolute()), to_csv(outcomes).encode())
    return _kept(steps)


def _load(
    name: str, budget: Budget, minutes: float | None, overrides: Iterable[str] = (), **fixed: Any
) -> Recipe:
    # How long is the same for all; everything else may be what a variant is about.
    length = [text for text in budget.overrides if text.startswith("training.")]
    beneath = [text for text in budget.overrides if text not in length]
    if minutes is not None:
        length += [f"training.minutes={minutes}", "training.steps=null"]
    overrides = [*length, *overrides]
    return load_recipe(f"{FOLDER}/{name}", overrides, beneath=beneath, data=budget.data, **fixed)


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """One table is of one budget: note it, or refuse another one."""
    path = folder / SETTINGS_FILE
    text = json.dumps(settings, indent=1) + "\n"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(str(path.absolute()), text.encode())
        return
    kept: dict[str, Any] = json.loads(path.read_text())
    other = [name for name, value in json.loads(text).items() if kept.get(name) != value]
    if other:
        raise UsageError(
            f"{folder} holds ablations with another '{other[0]}': {kept.get(other[0])}.",
            "Give the same, or another --out.",
        )


def _measure(
    recipe: Recipe, pairs: str, model: Path, folder: Path, name: str
) -> dict[str, dict[str, float | None]]:
    figures: dict[str, dict[str, float | None]] = {}
    several = tuple(steps for steps in recipe.evaluation.steps if steps > 1)
    for suffix, steps, settings in (
        ("", recipe.evaluation.steps, RestorationSettings()),
        (EVEN, several, RestorationSettings(warp=(1.0, 1.0))),
    ):
        if not steps:
            continue
        evaluation = evaluate(
            model,
            pairs,
            folder / "evaluations" / (name + ("-even" if suffix else "")),
            steps=steps,
            settings=settings,
            metrics=tuple(METRICS),
            lpips=recipe.lpips,
            pictures=recipe.evaluation.pictures,
            title=name + suffix,
        ).evaluation
        for system in evaluation.scores:
            if not (suffix and system == BICUBIC):
                figures[system + suffix] = {
                    metric: evaluation.mean(system, metric) for metric in METRICS
                }
    return figures


def _outcome(
    training: Plan, trained: Distilled, figures: dict[str, dict[str, float | None]]
) -> Outcome:
    recipe = training.recipe
    parameters = _parameters(recipe.backbone_settings)
    networks, learning = (3, 2) if recipe.objective.teacher else (1, 1)
    averages = learning if recipe.engine.ema_decay > 0 else 0
    position = trained.position
    return Outcome(
        variant=training.variant,
        seed=training.seed,
        parameters=parameters,
        held=parameters * (networks + averages),
        steps=position["steps"],
        samples=position["samples"],
        seconds=position["seconds"],
        peak_mb=position["peak_mb"],
        figures=figures,
    )


def _parameters(settings: DiTSettings) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DualBranchDiT(settings).parameters())


def _record(client: Any, run_id: str, outcome: Outcome) -> None:
    client.set_tag(run_id, "ablation", outcome.variant)
    client.set_tag(run_id, "seed", str(outcome.seed))
    for system, means in outcome.figures.items():
        for metric, mean in means.items():
            if mean is not None:
                name = f"evaluation/{metric}/{system.replace(',', '')}"
                client.log_metric(run_id, name, mean)
    client.set_terminated(run_id)


def _summary(outcome: Outcome) -> str:
    one = outcome.figures[system_name(1)]["psnr_y"]
    return (
        f"{one:.2f} dB at 1 step, {outcome.samples} pairs at "
        f"{outcome.samples_per_second:.1f} pairs/s, {outcome.peak_mb:.0f} MB"
    )


def _kept(steps: Steps) -> list[Outcome]:
    """Outcomes of all steps that ended, starts and the full method first."""
    outcomes = []
    for path in sorted(steps.folder.glob("*.json")):
        document = steps.kept(path.stem)
        if document is not None:
            result = dict(document["result"])
            del result["summary"]
            outcomes.append(Outcome(**result))
    return sorted(outcomes, key=_rank)


def _rank(outcome: Outcome) -> tuple[bool, bool, str, int]:
    name = outcome.variant
    return not name.startswith(START), name not in (START, FULL), name, outcome.seed


# ---------------------------------------------------------------- the table


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Costs, then a table per metric: means over seeds ± their standard deviation."""
    groups = _by_variant(outcomes)
    systems = [name for name in outcomes[0].figures if name != BICUBIC]
    costs = {
        "seeds": lambda some: ", ".join(str(one.seed) for one in some),
        "weights (millions)": _column(lambda one: one.parameters / 1e6, 2),
        "weights held in training (millions)": _column(lambda one: one.held / 1e6, 2),
        "peak memory (MB)": _column(lambda one: one.peak_mb, 0),
        "pairs/s": _column(lambda one: one.samples_per_second, 1),
        "pairs seen": _column(lambda one: one.samples, 0),
        "minutes": _column(lambda one: one.seconds / 60, 1),
    }
    parts = [_table("cost", costs, groups)]
    missing = []
    for metric, (heading, digits) in METRICS.items():
        if not any(
            one.figures[system][metric] is not None for one in outcomes for system in systems
        ):
            missing.append(heading.split()[0])
            continue
        columns = {
            system: _column(lambda one, s=system, m=metric: one.figures[s][m], digits)  # type: ignore[misc]
            for system in systems
        }
        cubic = _mean([outcomes[0].figures[BICUBIC][metric]], digits)
        parts += [_table(heading, columns, groups), f"Bicubic: {cubic}."]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    parts.append("± is the standard deviation over seeds, where there are several.")
    return "\n\n".join(parts) + "\n"


def to_csv(outcomes: Sequence[Outcome]) -> str:
    """One line per variant, seed and system; a metric that was not measured is empty."""
    costs = ("parameters", "held", "steps", "samples", "seconds", "samples_per_second", "peak_mb")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", "system", *METRICS, *costs])
    for one in outcomes:
        for system, means in one.figures.items():
            cells = ["" if means[m] is None else f"{means[m]:.6f}" for m in METRICS]
            values = [f"{getattr(one, name):.10g}" for name in costs]
            writer.writerow([one.variant, one.seed, system, *cells, *values])
    return text.getvalue()


Column = Callable[[list[Outcome]], str]


def _by_variant(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.variant, []).append(outcome)
    return groups


def _column(value: Callable[[Outcome], float | None], digits: int) -> Column:
    return lambda some: _mean([value(one) for one in some], digits)


def _mean(values: Sequence[float | None], digits: int) -> str:
    """`24.31 ± 0.05`, `24.31` of one value, or `not measured`."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "not measured"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def _table(corner: str, columns: dict[str, Column], groups: dict[str, list[Outcome]]) -> str:
    lines = [[corner, *columns], ["---", *(["---:"] * len(columns))]]
    lines += [
        [name, *(column(some) for column in columns.values())] for name, some in groups.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
