"""`teasr history NAME --version V`: all that is known of a version, on one screen."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jobs.figures import table
from teasr.lineage import VersionDetails, sections


def screen(details: VersionDetails) -> Group:
    """What `lineage.sections` tells under headings, and the figures; what happened last."""
    aliases = f" ({', '.join(details.aliases)})" if details.aliases else ""
    title = f"{details.model} version {details.version}{aliases}\n"
    told = dict(sections(details))
    changes = told.pop("Changes")
    parts: list[RenderableType] = [Text(title, "bold")]
    parts += [_section(heading, lines) for heading, lines in told.items()]
    if details.evaluation is not None:
        parts += [Text("Figures", "bold"), Padding(table(details.evaluation), (0, 0, 1, 2))]
    return Group(*parts, _section("Changes", changes))


def _section(heading: str, lines: dict[str, str]) -> Padding:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in lines.items():
        grid.add_row(f"  {name}", Text(text))
    return Padding(Group(Text(heading, "bold"), grid), (0, 0, 1, 0))
