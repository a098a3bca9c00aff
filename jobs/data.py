"""`teasr data`: look at a dataset, check it, compare it with another.

`diff` and `validate` answer by their exit code as well: 0 for the same data or for sound data, 1
otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.console import console, progress_bar, say, suggest
from teasr.errors import TeasrError, UsageError

if TYPE_CHECKING:
    from pipelines.compare import Comparison
    from pipelines.validate import Report

app = typer.Typer(
    name="data", help="Look at datasets, check them, compare them.", no_args_is_help=True
)

Folder = Annotated[str, typer.Argument(metavar="DIR", help="Folder of a dataset, or its URL.")]
Shown = Annotated[int, typer.Option("--show", help="Print at most this many of each kind.", min=1)]
Shards = Annotated[
    int, typer.Option("--shards", help="Read at most this many shards, spread evenly.", min=1)
]


@app.command()
def show(folder: Folder, shards: Shards = 8) -> None:
    """What a dataset is: kind, size, fingerprint, how it was made, sizes of its pictures."""
    import numpy as np

    from jobs.data_page import facts
    from pipelines.look import documents, sides

    found = documents(folder, shards)
    lines = facts(found.manifest)
    for name, values in sides(found.documents).items():
        if values:
            low, middle, high = np.percentile(values, [0, 50, 100])
            spread = f"{low:.0f} to {high:.0f} pixels, median {middle:.0f}"
            lines[name] = f"{low:.0f} pixels" if low == high else spread
    formats = Counter(suffix for document in found.documents for suffix in document.formats)
    if formats:
        lines["formats"] = ", ".join(f"{count} {suffix}" for suffix, count in formats.most_common())
    if found.shards < len(found.manifest.shards):
        of = f"{found.shards} of {len(found.manifest.shards)} shards"
        lines["looked at"] = f"{len(found.documents)} samples in {of}, for sizes and formats"
    for name, value in lines.items():
        say(f"{name:>11}  {value}")
    suggest(f"teasr data sheet {folder}", f"teasr data validate {folder}")


@app.command()
def validate(
    folder: Folder,
    replay: Annotated[
        bool, typer.Option("--replay", help="Also make each LR again from its recipe and compare.")
    ] = False,
    show: Shown = 5,
) -> None:
    """Check every byte: manifest, hashes, samples, pictures. Exit code 1 for any problem."""
    from pipelines.validate import validate as run

    with progress_bar("validate", total=1.0) as update:
        report = run(
            folder,
            replaying=replay,
            progress=lambda done, total: update(done / total, f"{done} of {total} shards"),
        )
    if report.problems:
        _tell_problems(report, show)
        raise TeasrError(
            f"{_count(len(report.problems), 'problem')} in {report.folder}.", _advice(report)
        )
    assert report.manifest is not None
    replayed = ", each LR replayed from its recipe" if replay else ""
    say(
        f"sound: {_count(report.samples, 'sample')} in "
        f"{_count(len(report.manifest.shards), 'shard')}, {report.bytes / 1e6:.1f} MB{replayed}",
        f"fingerprint {report.manifest.fingerprint}",
    )
    if report.manifest.kind == "pairs" and not replay:
        suggest(f"teasr data validate {folder} --replay")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of a dataset, or its URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    show: Shown = 5,
) -> None:
    """Compare two datasets; reads only shards that differ. Exit code 1 when the data differ."""
    from pipelines.compare import compare

    with progress_bar("diff", total=1.0) as update:
        found = compare(
            a, b, progress=lambda done, total: update(done / total, f"{done} of {total} shards")
        )
    if found.equal:
        say(f"the same data: {_count(len(found.same), 'shard')}, byte for byte")
    for name, (left, right) in found.fields.items():
        say(f"{name}: {_value(left)} -> {_value(right)}")
    if found.equal:
        return
    tell_comparison(found, show)
    raise TeasrError(f"{a} and {b} are not the same data.")


@app.command()
def sheet(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Folder for the sheet and the page.")] = Path("sheet"),
    samples: Annotated[int, typer.Option(help="Samples that are shown.", min=1, max=500)] = 12,
    seed: Annotated[int, typer.Option(help="Another seed shows other samples.", min=0)] = 0,
    shards: Shards = 64,
    preset: Annotated[
        str | None,
        typer.Option(help="Preset to mark in the plots, or its YAML [default: the manifest's]."),
    ] = None,
) -> None:
    """A look at the data: a contact sheet, and a page with recipes and distributions."""
    from jobs.data_page import data_sheet

    if (out / "manifest.json").exists():
        raise UsageError(f"{out} is a dataset.", "Give another folder with --out.")
    with progress_bar("sheet", total=1.0) as update:
        made = data_sheet(
            folder,
            out,
            samples=samples,
            seed=seed,
            max_shards=shards,
            preset=preset,
            progress=update,
        )
    say(
        f"contact sheet {made.sheet}",
        f"page {made.page}: distributions of {_count(made.samples, 'sample')} in "
        f"{_count(made.shards, 'shard')}; it opens in any browser, from the file",
    )
    suggest(f"teasr data validate {folder}")


def tell_comparison(found: Comparison, show: int) -> None:
    """Print what differs in shards and samples, at most `show` names of each kind."""
    for title, names in (
        ("shards of the same bytes", found.same),
        ("shards that changed", found.changed),
        ("shards only in A", found.only_a),
        ("shards only in B", found.only_b),
    ):
        if names:
            say(f"{len(names)} {title}" + ("" if names is found.same else f": {_few(names, show)}"))
    for title, keys in (
        ("samples only in A", found.keys_only_a),
        ("samples only in B", found.keys_only_b),
    ):
        if keys:
            say(f"{len(keys)} {title}: {_few(keys, show)}")
    if found.samples:
        say(f"{_count(len(found.samples), 'sample')} with different bytes:")
    for sample in found.samples[:show]:
        members = ", ".join(f".{suffix}{_level(level)}" for suffix, level in sample.members.items())
        say(f"  {sample.key}: {members}")
    if len(found.samples) > show:
        say(f"  ... and {len(found.samples) - show} more")


def _level(level: int | None) -> str:
    if level is None:
        return ""
    return f" (up to {level} of 255 grey levels)" if level else " (equal pixels, encoded otherwise)"


def _tell_problems(report: Report, show: int) -> None:
    from pipelines.validate import KINDS

    for kind, title in KINDS.items():
        problems = [problem for problem in report.problems if problem.kind == kind]
        if not problems:
            continue
        console.print(f"[red]✗[/] {len(problems)} in {title}", highlight=False)
        for problem in problems[:show]:
            place = " ".join(part for part in (problem.shard, problem.key) if part)
            text = problem.text
            # A shard's own messages name it.
            prefix = "" if not place or text.startswith(f"Shard {place}") else f"{place}: "
            say(f"    {prefix}{text}")
        if len(problems) > show:
            say(f"    ... and {len(problems) - show} more")


def _advice(report: Report) -> str:
    """What to do, for the first cause: what made a shard makes it again."""
    kinds = {problem.kind for problem in report.problems}
    again = "run the command that made the dataset again"
    damaged = sorted(
        {
            problem.shard
            for problem in report.problems
            if problem.kind in ("changed", "structure", "count", "unreadable")
        }
    )
    if "manifest" in kinds:
        return f"Delete {report.folder}/manifest.json and {again}: sound shards are kept."
    if damaged:
        return f"Delete {_few(damaged, 5)} and {again}."
    if "missing" in kinds:
        return f"{again[0].upper()}{again[1:]}: it writes what is missing."
    if kinds & {"json", "picture", "agreement"}:
        return "The shards are as they were written: " + (
            "the pictures they were made of are bad. Leave them out and make the dataset again."
        )
    if "replay" in kinds:
        versions = report.manifest.versions if report.manifest else {}
        made = ", ".join(f"{name} {version}" for name, version in versions.items())
        return (
            "Another release of teasr or of a library, or another processor, may round otherwise; "
            f"made with: {made}."
        )
    return "Move the files that the manifest does not list away."


def _few(names: Sequence[str], show: int) -> str:
    rest = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(names[:show]) + rest


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _value(value: object) -> str:
    return "none" if value is None else str(value)
