"""`teasr retrain`: the whole journey, from photographs to a promoted version, as named steps.

ingest -> benchmark -> distill -> evaluate -> register -> promote. Each step is reused while its
inputs stay the same, so a rerun after a crash repeats only what is missing, and a rerun with
nothing new says so. With `warm_start` a training begins from the champion of that moment, which the
run notes; it is no input of the step, or every promotion would be something new to learn from. The
photographs of the benchmark are chosen once and kept out of training for good; photographs that are
added later are trained on.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from jobs import gate_report
from jobs.distill import distill
from jobs.evaluate import EVALUATION_FILE, evaluate
from jobs.locks import only_one
from jobs.preemption import Preempted
from jobs.recipe import Recipe
from jobs.steps import Steps
from pipelines.ingest import MOST_SHRINK, file_stamps, ingest, is_picture
from pipelines.inputs import training_inputs
from pipelines.synthesize import synthesize
from teasr import lineage, promotion, registry, tracking
from teasr.drift import REFERENCE_FILE
from teasr.errors import TeasrError, UsageError
from teasr.evaluation import BICUBIC, Evaluation, system_name
from teasr.images import decode
from teasr.shards import absolute_url, content_hash, read_manifest, write_bytes

if TYPE_CHECKING:
    from mlflow import MlflowClient

HELD_OUT_FILE = "held-out.json"


@dataclass(frozen=True)
class Retrained:
    """What a retraining came to.

    Attributes:
        version: the registered version.
        promoted: whether it is the champion now.
        new: whether anything was done; False when there was nothing new to learn from.
        evaluation: of that version.
        files: folder of the evaluation's files.
    """

    version: int
    promoted: bool
    new: bool
    evaluation: Evaluation
    files: Path


def retrain(recipe: Recipe, home: Path, recipe_name: str = "") -> Retrained:
    """Run the journey of `recipe` in `home`.

    Args:
        recipe_name: what the recipe is called, for the record.

    Raises:
        UsageError: no photographs, or a recipe that does not fit.
        Busy: another retraining of the same model is running.
        Preempted: SIGTERM came; the steps that ended are kept.
        TeasrError: a step failed, or the MLflow server is away.
    """
    with only_one(home / f"{recipe.model}.lock", f"A retraining of '{recipe.model}'"):
        try:
            return _retrain(recipe, home, recipe_name)
        except SystemExit as end:
            if end.code != 128 + signal.SIGTERM:
                raise
            raise Preempted(
                "SIGTERM ended the retraining.", "The same command goes on with the step it was in."
            ) from None


def _retrain(recipe: Recipe, home: Path, recipe_name: str) -> Retrained:
    steps = Steps(home / "steps" / recipe.model)
    client = tracking.connect(home)
    data, held_out, pairs = (home / "data" / name for name in ("train", "held-out", "benchmark"))
    if recipe.photos:
        _ingest(steps, recipe, data, held_out, pairs)
        recipe = recipe.model_copy(update={"data": str(data), "benchmark": str(pairs)})
    if recipe.data is None or recipe.benchmark is None:
        raise UsageError(
            "The recipe has neither photos nor both data and benchmark.",
            "Set photos to a folder of photographs.",
        )

    learned = {"recipe": _learning(recipe), "data": _fingerprint(recipe.data)}
    run_folder = home / "runs" / f"{recipe.model}-{content_hash(learned)[:12]}"

    def train() -> dict[str, Any]:
        result = distill(recipe, run_folder, _champion(client, recipe))
        position = result.position
        return {
            "run_id": result.run_id,
            "model": str(result.model),
            "summary": f"{position['steps']} steps, {position['samples']} pairs, "
            f"{position['seconds'] / 60:.1f} min",
        }

    trained = steps.run("distill", learned, train)
    measured_on = {
        "run": trained["run_id"],
        "benchmark": _fingerprint(recipe.benchmark),
        "evaluation": recipe.evaluation.model_dump(mode="json"),
    }
    files = run_folder / "evaluation"

    def measure() -> dict[str, Any]:
        assert recipe.benchmark is not None
        tracking.connect(home)  # a server that went away is told at once: MLflow tries for minutes
        result = evaluate(
            Path(trained["model"]),
            recipe.benchmark,
            files,
            steps=recipe.evaluation.steps,
            pictures=recipe.evaluation.pictures,
        )
        if result.sheet.is_file():
            client.log_artifact(trained["run_id"], str(result.sheet))
        client.log_artifact(trained["run_id"], str(result.page))
        one, cubic = (result.evaluation.mean(name, "psnr_y") for name in (system_name(1), BICUBIC))
        return {"summary": f"{one:.2f} dB at 1 step, bicubic {cubic:.2f} dB"}

    steps.run("evaluate", measured_on, measure)
    evaluation = Evaluation.from_json((files / EVALUATION_FILE).read_text())

    def register() -> dict[str, Any]:
        assert recipe.data is not None
        tracking.connect(home)
        inputs = training_inputs(recipe.data, recipe.feed)
        client.log_text(trained["run_id"], inputs.to_json(), REFERENCE_FILE)
        uri = registry.log_model(client, trained["run_id"], Path(trained["model"]), recipe.model)
        tags = _origin(client, recipe, recipe_name)
        version = registry.register(client, trained["run_id"], uri, recipe.model, evaluation, tags)
        lineage.describe(client, recipe.model, version)
        client.set_terminated(trained["run_id"])
        return {
            "version": version,
            "summary": f"{recipe.model} version {version}, alias challenger",
        }

    version = steps.run("register", measured_on, register)["version"]

    def through_gate() -> dict[str, Any]:
        tracking.connect(home)
        by = f"{promotion.current_user()} (teasr retrain{f' {recipe_name}' if recipe_name else ''})"
        # Promoted before, by this step when it was cut off or by hand.
        if promotion.champion_version(client, recipe.model) == version:
            return {"promoted": True, "summary": f"version {version} is the champion"}
        outcome, _ = gate_report.promote(
            client, recipe.model, version, recipe.gate, recipe.benchmark, by=by
        )
        assert outcome.verdict is not None
        promotion.run_hook(client, outcome)
        failed = [check.detail for check in outcome.verdict.checks if check.passed is False]
        return {
            "promoted": outcome.promoted,
            "summary": f"version {version} is the champion"
            if outcome.promoted
            else f"version {version} was refused: {'; '.join(failed)}",
        }

    gate = {**measured_on, "version": version, "gate": recipe.gate.model_dump(mode="json")}
    promoted = steps.run("promote", gate, through_gate)["promoted"]
    return Retrained(version, promoted, bool(steps.done), evaluation, files)


def _ingest(steps: Steps, recipe: Recipe, data: Path, held_out: Path, pairs: Path) -> None:
    stamps = file_stamps(recipe.photos)
    sources = list(stamps)
    pictures = [source for source in sources if is_picture(source)]
    most = MOST_SHRINK if recipe.shrink == "auto" else recipe.shrink
    side = math.ceil(most * recipe.evaluation.crop)
    usable = partial(_is_usable, min_side=side)
    chosen = split(pictures, recipe.held_out, data.parent / HELD_OUT_FILE, usable)
    train = [source for source in sources if source not in chosen]
    if not chosen:
        raise UsageError(
            f"{len(pictures)} photograph(s) in {', '.join(recipe.photos)}: too few, too small or "
            "broken. Some are learned from, some are kept to measure on.",
            f"Give at least 2, better 20 or more, of {side} pixels or more a side; or a smaller "
            "evaluation.crop.",
        )

    def read() -> dict[str, Any]:
        kept = ingest(sorted(chosen), str(held_out), shrink=recipe.shrink)
        # A copy of what is measured on, under another name, must not be learned from.
        summary = ingest(train, str(data), shrink=recipe.shrink, against=[str(held_out)])
        bad = sum(summary.quarantined.values()) + sum(kept.quarantined.values())
        return {
            "summary": f"{summary.samples} photographs to learn from, {kept.samples} kept to "
            f"measure on, {bad} quarantined"
        }

    steps.run("ingest", {"files": stamps, "shrink": recipe.shrink}, read)

    def degrade() -> dict[str, Any]:
        made = synthesize(
            str(held_out),
            str(pairs),
            preset=recipe.feed.main_preset,
            copies=recipe.evaluation.copies,
            seed=recipe.feed.seed,
            crop=recipe.evaluation.crop,
        )
        return {"summary": f"{made.samples} pairs of the photographs kept"}

    settings = {"preset": recipe.feed.main_preset, "evaluation": recipe.evaluation.model_dump()}
    steps.run("benchmark", {**settings, "source": _fingerprint(str(held_out))}, degrade)


def split(
    sources: Sequence[str], share: float, record: Path, usable: Callable[[str], bool]
) -> set[str]:
    """Which of `sources` are kept for the benchmark.

    Those recorded before, else the `usable` ones whose names hash lowest, a `share` of all (at
    least one), which are then recorded: the benchmark stays as it is for good.
    """
    if record.is_file():
        return set(json.loads(record.read_text())) & set(sources)
    if len(sources) < 2:
        return set()
    count = max(1, math.ceil(share * len(sources)))
    ranked = sorted(sources, key=lambda s: hashlib.sha256(Path(s).name.encode()).hexdigest())
    chosen = list(islice(filter(usable, ranked), count))
    if chosen:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(str(record.absolute()), json.dumps(sorted(chosen), indent=1).encode())
    return set(chosen)


def _is_usable(url: str, min_side: int) -> bool:
    """Whether a benchmark can be made of the picture at `url`."""
    try:
        with fsspec.open(url, "rb") as file:
            decode(file.read(), min_side=min_side)
    except (TeasrError, OSError):
        return False
    return True


def _champion(client: MlflowClient, recipe: Recipe) -> str | None:
    """What a warm start begins from; None without one, and before the first champion."""
    version = _live(client, recipe.model) if recipe.warm_start else None
    return None if version is None else f"models:/{recipe.model}/{version}"


def _live(client: MlflowClient, model: str) -> int | None:
    """The champion's version; None before the first one, and for a model without versions."""
    try:
        return promotion.champion_version(client, model)
    except UsageError:
        return None


def _origin(client: MlflowClient, recipe: Recipe, recipe_name: str) -> dict[str, str | None]:
    """What a version notes of where it comes from, beside what its training run has noted."""
    assert recipe.data is not None and recipe.benchmark is not None
    manifest = read_manifest(recipe.data)
    shares = recipe.feed.presets
    mixture = ", ".join(
        f"{name} {share:.0%}" if len(shares) > 1 else name for name, share in shares.items()
    )
    champion = _live(client, recipe.model)
    return {
        "dataset": manifest.fingerprint,
        "data_size": f"{manifest.samples} photographs, shards: {len(manifest.shards)}",
        "degradation": mixture,
        "benchmark_location": tracking.mask_credentials(absolute_url(recipe.benchmark)),
        "recipe": recipe_name or None,
        "init": recipe.init,
        "champion": "none, as the first" if champion is None else f"version {champion}",
    }


def _learning(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that decides what is learned: a run that goes on elsewhere, with more
    workers or other offloads, is the same run."""
    length = recipe.training.model_dump(mode="json", include={"minutes", "steps"})
    return {**recipe.trajectory, **length}


def _fingerprint(dataset: str) -> str:
    return read_manifest(dataset).fingerprint
