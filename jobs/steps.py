"""Named steps whose results are kept: what was done with equal inputs is not done again.

A step's result is a small JSON document, written whole after the step ended. Interrupting a journey
loses at most the step that was running, and running it again goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.console import console
from teasr.shards import content_hash, write_bytes


@dataclass
class Steps:
    """The steps of one journey.

    Attributes:
        folder: where results are kept, a file per step.
        done: names of the steps that were carried out, not reused, by this object.
    """

    folder: Path
    done: list[str] = field(default_factory=list)

    def run(
        self, name: str, inputs: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The result of step `name` for `inputs`: the kept one, or that of `work()`.

        Args:
            inputs: JSON; everything that the result depends on.
            work: does the step and returns its result as JSON, with a `summary` for people.
        """
        path = self.folder / f"{name}.json"
        identity = content_hash([name, dict(inputs)])
        kept = self.kept(name)
        if kept is not None and kept["identity"] == identity:
            result: dict[str, Any] = kept["result"]
            console.print(
                f"[green]✓[/] {name}: {result['summary']} [dim](as before)[/]", soft_wrap=True
            )
            return result
        result = dict(work())
        self.folder.mkdir(parents=True, exist_ok=True)
        document = {"identity": identity, "result": result}
        write_bytes(str(path.absolute()), (json.dumps(document, indent=1) + "\n").encode())
        self.done.append(name)
        console.print(f"[green]✓[/] {name}: {result['summary']}", soft_wrap=True)
        return result

    def kept(self, name: str) -> dict[str, Any] | None:
        """The document of a step that ended, `identity` and `result`, or None."""
        try:
            document: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None
        return document if {"identity", "result"} <= document.keys() else None
