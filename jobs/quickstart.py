"""`teasr quickstart`: the whole journey on sample photographs, on one machine, every part real.

Photographs -> `retrain` (ingest, distill, evaluate, register, promote) -> a scoring server
started from the champion, asked for one picture and stopped -> a restored picture written. The
network starts from the weights that ship with the package and is distilled further on the
photographs given.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.recipe import Recipe
from jobs.retrain import Retrained, retrain
from jobs.steps import Steps
from teasr import promotion, registry
from teasr.backbones import load_model
from teasr.errors import TeasrError, UsageError
from teasr.images import decode
from teasr.restoration import RestorationSettings, restore_picture
from teasr.serving import ScoringServer, request
from teasr.shards import join_url, read_manifest, read_shard
from teasr.tracking import connect

SAMPLES_MODULE = "interior_photos"


@dataclass(frozen=True)
class Quickstarted:
    """Where everything is."""

    retrained: Retrained
    before: Path
    """A low-resolution picture of the benchmark."""
    after: Path
    """The same picture, restored by the scoring server."""


def sample_photographs() -> str:
    """Folder of the photographs of the `samples` extra.

    Raises:
        UsageError: when the extra is not installed.
    """
    if importlib.util.find_spec(SAMPLES_MODULE) is None:
        raise UsageError(
            "The sample photographs are not installed.",
            "Run: pip install 'teasr[samples]' - or give your own with --photos FOLDER.",
        )
    return str(importlib.resources.files(SAMPLES_MODULE) / "images")


def quickstart(recipe: Recipe, home: Path) -> Quickstarted:
    """Run the journey of `recipe` in `home`, then serve and use its champion.

    Raises:
        UsageError, TeasrError: as `jobs.retrain.retrain`; and when the server does not start or
            answers another picture than the model makes here.
    """
    retrained = retrain(recipe, home, "quickstart")
    steps = Steps(home / "steps" / recipe.model)
    client = connect(home)
    champion = promotion.champion_version(client, recipe.model)
    if champion is None:
        raise TeasrError(
            f"No version of '{recipe.model}' passed the gate, so there is nothing to serve.",
            "Train longer with --minutes, or look at the verdict: teasr history " + recipe.model,
        )
    pictures = home / "pictures"
    before, after = pictures / "before.png", pictures / "after.png"

    def serve() -> Mapping[str, Any]:
        lr = _benchmark_picture(home)
        pictures.mkdir(parents=True, exist_ok=True)
        with ScoringServer(f"models:/{recipe.model}@champion", client=client) as server:
            answer = request(server.url, lr)
        model = load_model(registry.resolve(f"models:/{recipe.model}/{champion}"))
        expected = restore_picture(
            model.network, decode(lr), RestorationSettings(), codec=model.codec
        )
        if decode(answer.png).rgb.tobytes() != decode(expected).rgb.tobytes():
            raise TeasrError("The scoring server's picture differs from the model's own.")
        before.write_bytes(lr)
        after.write_bytes(answer.png)
        return {"summary": f"version {champion} answered over HTTP, its picture is the model's own"}

    steps.run("serve", {"version": champion}, serve)
    return Quickstarted(retrained, before, after)


def _benchmark_picture(home: Path) -> bytes:
    """The LR picture of the benchmark's first pair, as PNG."""
    pairs = str(home / "data" / "benchmark")
    shard = read_manifest(pairs, "pairs").shards[0]
    return next(read_shard(join_url(pairs, shard.name))).members["lr.png"]
