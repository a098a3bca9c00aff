"""The dial from quick to thorough: quality and seconds by number of steps and way to take them.

    python benchmarks/dial.py [--benchmark FOLDER | --data PAIRS] [--svg FILE] [--quick]

Every picture is restored with every setting in turn, one thread on one core: `few` on the default
levels, `few`, `any`, `multi` and, when asked for, `heun` on uniform ones. Pictures are given as to
`peers.py`; without any, the sample photographs are degraded by both presets. Prints a Markdown
table and draws LPIPS (PSNR-Y without its weights) over seconds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from peers import METRICS, Pair, add_source, counts, lpips_of, one_core, pairs_of

from teasr import registry
from teasr.backbones import Model, load_model
from teasr.errors import TeasrError
from teasr.lpips import Lpips
from teasr.metrics import score
from teasr.niqe import niqe
from teasr.plots import Curves, Point, document
from teasr.restoration import RestorationSettings, restore

STYLES = {
    "few": {"style": "few"},
    "few, uniform": {"style": "few", "warp": (1.0, 1.0)},
    "any": {"style": "any", "warp": (1.0, 1.0)},
    "multi": {"style": "multi", "warp": (1.0, 1.0)},
    "heun": {"style": "heun", "warp": (1.0, 1.0)},
}
STEPS = "1,2,3,4,6,8,12,16"
Figures = dict[str, float]
"""Means over the pictures by metric, those that were measured on every one, and the median of
`seconds_per_megapixel` of the result."""
Key = tuple[str, int]
"""A way to take steps, of `STYLES`, and their number."""


def measure(
    name: str, pairs: list[Pair], model: Model, keys: list[Key], lpips: Lpips | None
) -> dict[Key, Figures]:
    """Figures by key; each picture is restored by all keys in turn."""
    settings = {
        (style, steps): RestorationSettings.model_validate(STYLES[style] | {"steps": steps})
        for style, steps in keys
    }
    restore(model.network, pairs[0].lr, RestorationSettings(), codec=model.codec)  # to warm up
    values: dict[Key, dict[str, list[float | None]]] = {key: {} for key in keys}
    for number, pair in enumerate(pairs, 1):
        print(f"\r{name}: {number} of {len(pairs)} pictures", end="", file=sys.stderr, flush=True)
        for key in keys:
            begin = time.perf_counter()
            restored = restore(model.network, pair.lr, settings[key], codec=model.codec)
            seconds = time.perf_counter() - begin
            scores = score(restored, pair.hr, lpips)
            measured = {metric: getattr(scores, metric) for metric in ("psnr_y", "ssim_y", "lpips")}
            measured["niqe"] = niqe(restored)
            measured["seconds_per_megapixel"] = seconds * 1e6 / (restored.size // 3)
            for metric, value in measured.items():
                values[key].setdefault(metric, []).append(value)
    print(file=sys.stderr)
    return {key: _summary(lists) for key, lists in values.items()}


def _summary(values: dict[str, list[float | None]]) -> Figures:
    figures = {}
    for metric, found in values.items():
        numbers = [value for value in found if value is not None]
        average = statistics.median if metric == "seconds_per_megapixel" else statistics.fmean
        if len(numbers) == len(found):
            figures[metric] = average(numbers)
    return figures


def print_table(name: str, count: int, figures: dict[Key, Figures]) -> None:
    """A Markdown table, a row for each key."""
    measured = [metric for metric in METRICS if all(metric in row for row in figures.values())]
    headings = [METRICS[metric][0] for metric in measured]
    print(f"\n{name}, {count} pictures\n")
    print(f"| style | steps | {' | '.join(headings)} | s/MP |")
    print(f"|---|{'---:|' * (len(headings) + 2)}")
    for (style, steps), row in figures.items():
        cells = [f"{row[metric]:.{METRICS[metric][1]}f}" for metric in measured]
        print(f"| {style} | {steps} | {' | '.join(cells)} | {row['seconds_per_megapixel']:.2f} |")


def plot(name: str, figures: dict[Key, Figures]) -> Curves:
    """LPIPS, or without it PSNR-Y, over seconds; a curve for each style."""
    metric = "lpips" if all("lpips" in row for row in figures.values()) else "psnr_y"
    curves: dict[str, list[Point]] = {}
    for (style, steps), row in figures.items():
        point = Point(row["seconds_per_megapixel"], row[metric], str(steps))
        curves.setdefault(style, []).append(point)
    unit = "LPIPS, lower is better" if metric == "lpips" else "PSNR-Y, dB"
    return Curves(f"{unit} by steps, {name}", "seconds per megapixel", unit, curves, True)


def styles(text: str) -> list[str]:
    """Names of `STYLES` that are separated by semicolons."""
    names = text.split(";")
    if unknown := [name for name in names if name not in STYLES]:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}' is none of: {'; '.join(STYLES)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_source(parser)
    parser.add_argument("--steps", default=STEPS, type=counts, help=f"[default: {STEPS}]")
    parser.add_argument(
        "--styles",
        default="few;few, uniform;any;multi",
        type=styles,
        help=f"of {'; '.join(STYLES)} [default: all but heun]",
    )
    parser.add_argument("--svg", type=Path, help="plot of the first set, such as docs/dial.svg")
    try:
        run(parser.parse_args())
    except TeasrError as error:
        sys.exit(str(error))


def run(arguments: argparse.Namespace) -> None:
    one_core()
    sets, lpips = pairs_of(arguments), lpips_of(arguments)
    model = load_model(registry.resolve(arguments.model))
    print(f"{registry.describe(arguments.model)}; one thread on one core")
    keys = [(style, steps) for style in arguments.styles for steps in arguments.steps]
    result = {}
    for name, pairs in sets.items():
        figures = measure(name, pairs, model, keys, lpips)
        print_table(name, len(pairs), figures)
        if arguments.svg and not result:
            arguments.svg.write_text(document(plot(name, figures)))
            print(f"\n{arguments.svg}")
        result[name] = {
            f"{style} {steps}": {metric: round(value, 4) for metric, value in row.items()}
            for (style, steps), row in figures.items()
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
