"""`teasr evaluate`: a model on a frozen benchmark; table, figures per picture, pages to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.console import progress_bar
from jobs.figures import (
    ORIGINAL,
    cut_for_page,
    directed_heading,
    figure,
    heading,
    mean_and_interval,
    not_measured,
)
from pipelines.benchmark import BenchmarkResult, Comparison, benchmark
from teasr import dists as dists_metric
from teasr.errors import UsageError
from teasr.evaluation import DEFAULT_METRICS, DRAWS, METRICS, Evaluation
from teasr.gallery import Figures, Scene, comparison_page
from teasr.images import decode
from teasr.lpips import find_weights
from teasr.no_reference import PYIQA, has_pyiqa
from teasr.restoration import RestorationSettings
from teasr.sheets import Row, sheet

EVALUATION_FILE = "evaluation.json"
CSV_FILE = "per-image.csv"
SHEET_FILE = "sheet.png"
PAGE_FILE = "index.html"
# Side of the detail that a sheet shows, in HR pixels: small enough to see single edges.
DETAIL = 160
# Of more pictures a sheet shows some of them, the page all.
SHEET_PICTURES = 8
# Longest side of what the page shows of a picture, in HR pixels: it holds every system's PNG.
PAGE_CUT = 768


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and the files that were written of it."""

    evaluation: Evaluation
    folder: Path

    @property
    def sheet(self) -> Path:
        """The picture sheet; not there when no pictures were asked for."""
        return self.folder / SHEET_FILE

    @property
    def page(self) -> Path:
        """The page with the table, and the pictures under sliders."""
        return self.folder / PAGE_FILE


def evaluate(
    model: Path,
    pairs: str,
    folder: Path,
    *,
    steps: tuple[int, ...] = (1, 4),
    settings: RestorationSettings | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    lpips: str | None = None,
    dists: str | None = None,
    pictures: int | None = 4,
    title: str = "Evaluation",
) -> Evaluated:
    """Measure the weights in `model` on `pairs` and write what was found to `folder`.

    Args:
        metrics: as `checked_metrics` gives them.
        lpips, dists: weights (LPIPS: AlexNet), a file or a folder; without them $TEASR_LPIPS and
            $TEASR_DISTS are looked at.
        pictures: how many the page shows, worst first; None for all.
        title: of the page.

    Raises:
        UsageError, TeasrError: as `pipelines.benchmark.benchmark`.
    """
    with progress_bar("evaluate", total=1.0) as update:
        result = benchmark(
            model,
            pairs,
            steps=steps,
            settings=settings,
            metrics=metrics,
            lpips_weights=find_weights("alex", lpips),
            dists_weights=dists_metric.find_weights(dists),
            pictures=pictures,
            progress=lambda done, total: update(done / total, f"{done} of {total} pictures"),
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVALUATION_FILE).write_text(result.evaluation.to_json())
    (folder / CSV_FILE).write_text(result.evaluation.to_csv())
    (folder / PAGE_FILE).write_text(draw_page(result, title))
    if result.pictures:
        draw_sheet(result, folder / SHEET_FILE)
    return Evaluated(result.evaluation, folder)


def checked_metrics(text: str) -> tuple[str, ...]:
    """The metrics named in `text`, such as `lpips,niqe`.

    Raises:
        UsageError: for a name that is none, and for one of pyiqa's without that package.
    """
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UsageError(
            f"--metrics {text}: there is no metric '{unknown[0]}'.", f"Known: {', '.join(METRICS)}."
        )
    optional = [name for name in names if name in PYIQA]
    if optional and not has_pyiqa():
        raise UsageError(
            f"--metrics {text}: the package pyiqa, which measures {', '.join(optional)}, is not "
            "installed.",
            "Do: pip install pyiqa",
        )
    return names


def draw_sheet(result: BenchmarkResult, path: Path) -> None:
    """A row per picture: LR | bicubic | the model at each number of steps | original."""
    systems = list(result.evaluation.scores)
    every = -(-len(result.pictures) // SHEET_PICTURES)
    rows = [_row(comparison, systems, result.evaluation) for comparison in result.pictures[::every]]
    sheet(rows, ["LR", *systems, ORIGINAL]).save(path)


def _row(comparison: Comparison, systems: list[str], evaluation: Evaluation) -> Row:
    hr = decode(comparison.hr).rgb
    height, width = hr.shape[:2]
    side = min(DETAIL, height, width)
    captions = [f"{evaluation.scores[name][comparison.key].psnr_y:.2f} dB" for name in systems]
    return Row(
        label=comparison.key,
        pictures=[
            decode(comparison.lr).rgb,
            *(decode(comparison.restored[name]).rgb for name in systems),
            hr,
        ],
        captions=["", *captions, ""],
        zoom=((width - side) // 2, (height - side) // 2, side, side),
    )


def draw_page(result: BenchmarkResult, title: str) -> str:
    """The table and the pictures as one HTML page; the worst of them first."""
    evaluation = result.evaluation
    systems = list(evaluation.scores)
    judged = systems[min(1, len(systems) - 1)]
    scores = evaluation.scores[judged]
    worst_first = sorted(result.pictures, key=lambda picture: scores[picture.key].psnr_y)
    metrics = evaluation.measured()
    rows = {
        system: [
            *("\n".join(mean_and_interval(evaluation, system, name)) for name in metrics),
            f"{evaluation.seconds_per_megapixel.get(system, 0):.2f}",
        ]
        for system in systems
    }
    headings = [heading(name) for name in metrics]
    facts = {
        "benchmark": evaluation.benchmark,
        "pictures": f"{len(scores)}, of which {len(result.pictures)} are shown",
        "not measured": not_measured(evaluation),
    }
    return comparison_page(
        title,
        {name: fact for name, fact in facts.items() if fact},
        Figures([*(directed_heading(name) for name in metrics), "s / megapixel"], rows),
        "Means over the pictures; ↑ more is better, ↓ less is better. Below each mean its 95% "
        f"interval: {DRAWS:,} bootstrap resamples of the pictures.",
        [_scene(picture, evaluation, metrics, headings) for picture in worst_first],
        f"The worst PSNR-Y of {judged} first. Move over a picture, or drag, to compare; the "
        "buttons choose what is compared. The figures are of the whole picture.",
        (systems[0], judged),
    )


def _scene(
    comparison: Comparison, evaluation: Evaluation, metrics: list[str], headings: list[str]
) -> Scene:
    pictures = {**comparison.restored, ORIGINAL: comparison.hr}
    size, pictures, note = cut_for_page(pictures, PAGE_CUT)
    rows = {
        system: [figure(name, getattr(scores[comparison.key], name)) for name in metrics]
        for system, scores in evaluation.scores.items()
    }
    return Scene(comparison.key, size, pictures, Figures(headings, rows), note)
