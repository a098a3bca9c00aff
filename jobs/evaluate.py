"""`teasr evaluate`: a model on a frozen benchmark; table, figures per picture, picture sheet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from jobs.console import progress_bar
from pipelines.benchmark import BenchmarkResult, Comparison, benchmark
from teasr.evaluation import Evaluation, summary_rows
from teasr.lpips import find_weights
from teasr.restoration import RestorationSettings
from teasr.sheets import Row, sheet

EVALUATION_FILE = "evaluation.json"
CSV_FILE = "per-image.csv"
SHEET_FILE = "sheet.png"
# Side of the detail that a sheet shows, in HR pixels: small enough to see single edges.
DETAIL = 160


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and the files that were written of it."""

    evaluation: Evaluation
    folder: Path

    @property
    def sheet(self) -> Path:
        """The picture sheet; not there when no pictures were asked for."""
        return self.folder / SHEET_FILE


def evaluate(
    model: Path,
    pairs: str,
    folder: Path,
    *,
    steps: tuple[int, ...] = (1, 4),
    settings: RestorationSettings | None = None,
    lpips: str | None = None,
    pictures: int = 4,
) -> Evaluated:
    """Measure the weights in `model` on `pairs` and write what was found to `folder`.

    Args:
        lpips: LPIPS weights (AlexNet), a file or a folder; without it $TEASR_LPIPS is looked at.

    Raises:
        UsageError, TeasrError: as `pipelines.benchmark.benchmark`.
    """
    weights = find_weights("alex", lpips)
    with progress_bar("evaluate", total=1.0) as update:
        result = benchmark(
            model,
            pairs,
            steps=steps,
            settings=settings,
            lpips_weights=weights,
            pictures=pictures,
            progress=lambda done, total: update(done / total, f"{done} of {total} pictures"),
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVALUATION_FILE).write_text(result.evaluation.to_json())
    (folder / CSV_FILE).write_text(result.evaluation.to_csv())
    if result.pictures:
        draw_sheet(result, folder / SHEET_FILE)
    return Evaluated(result.evaluation, folder)


def draw_sheet(result: BenchmarkResult, path: Path) -> None:
    """A row per picture: LR | bicubic | the model at each number of steps | original."""
    systems = list(result.evaluation.scores)
    rows = [_row(comparison, systems, result.evaluation) for comparison in result.pictures]
    sheet(rows, ["LR", *systems, "original"]).save(path)


def _row(comparison: Comparison, systems: list[str], evaluation: Evaluation) -> Row:
    height, width = comparison.hr.shape[:2]
    side = min(DETAIL, height, width)
    captions = [f"{evaluation.scores[name][comparison.key].psnr_y:.2f} dB" for name in systems]
    return Row(
        label=comparison.key,
        pictures=[
            comparison.lr,
            *(comparison.restored[name] for name in systems),
            comparison.hr,
        ],
        captions=["", *captions, ""],
        zoom=((width - side) // 2, (height - side) // 2, side, side),
    )


def table(evaluation: Evaluation, title: str = "") -> Table:
    """The summary for people; a metric that was not measured says so."""
    result = Table(title=title or None, title_justify="left")
    for heading in ("", "PSNR-Y (dB)", "SSIM-Y", "LPIPS", "s / megapixel"):
        result.add_column(heading, justify="left" if not heading else "right")
    for system, means in summary_rows(evaluation):
        lpips = means["lpips"]
        result.add_row(
            system,
            f"{means['psnr_y']:.2f}",
            f"{means['ssim_y']:.4f}",
            "not measured" if lpips is None else f"{lpips:.4f}",
            f"{evaluation.seconds_per_megapixel.get(system, 0):.2f}",
        )
    return result
