"""Variants, their common start, and the table that is made of what they came to."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs.ablate import Budget, Outcome, ablate, markdown, plan, to_csv, variants
from jobs.recipe import Recipe, load_recipe
from teasr.errors import UsageError
from teasr.images import encode

BUDGET = Budget("data", "pairs", minutes=5, start_minutes=8)


def planned(folder: Path, budget: Budget = BUDGET, only: str = "", seeds: tuple[int, ...] = (0,)):
    names = only.split(",") if only else []
    return {one.name: one for one in plan(budget, folder, names, seeds)}


# ---------------------------------------------------------------- recipes


def test_what_each_variant_changes() -> None:
    full = load_recipe("ablations/full", init="x")

    def changed(name: str) -> dict[str, object]:
        mine, theirs = (
            dict(_flat(recipe.model_dump())) for recipe in (load_recipe(name, init="x"), full)
        )
        return {key: value for key, value in mine.items() if value != theirs[key]}

    assert {name: changed(f"ablations/{name}") for name in variants()} == {
        "full": {},
        "no-self-adversarial": {"objective.self_adversarial": 0, "objective.rectification": 0},
        "pure-noise-rectification": {"objective.timestep_aware": False},
        "summed-timesteps": {"backbone.timesteps": "summed"},
        "single-branch": {"backbone.branches": "single"},
        "teacher": {
            "objective.teacher": True,
            **{f"objective.{term}": 0 for term in ("any_step", "end_to_end", "flow_matching")},
        },
    }


def _flat(tree: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        pairs += _flat(value, f"{key}.") if isinstance(value, dict) else [(key, value)]
    return pairs


def test_a_recipe_extends_another_section_by_section(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "objective: {any_step: 0.5, pixel_mse: 2}\ntraining: {steps: 9, batch: 4}\n"
    )
    (tmp_path / "child.yaml").write_text("extends: base\nobjective: {any_step: 0.1}\n")
    child = str(tmp_path / "child.yaml")
    recipe = load_recipe(child)
    assert (recipe.objective.any_step, recipe.objective.pixel_mse) == (0.1, 2)
    assert (recipe.training.steps, recipe.training.batch) == (9, 4)
    beneath = load_recipe(child, beneath=["objective.any_step=9", "objective.pixel_mse=9"])
    assert (beneath.objective.any_step, beneath.objective.pixel_mse) == (0.1, 9)
    assert load_recipe(child, ["objective.any_step=9"]).objective.any_step == 9


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("extends: nothing", "is not there"),
        ("extends: child", "leads back to itself"),
        ("extends: base\nbackbone: {width: 64}", "'backbone' is a section here"),
    ],
)
def test_a_wrong_extension_is_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "base.yaml").write_text("backbone: teasr-xs\ntraining: {steps: 1}\n")
    (tmp_path / "child.yaml").write_text(text)
    with pytest.raises(UsageError, match=told):
        load_recipe(str(tmp_path / "child.yaml"))


@pytest.mark.parametrize(
    "override",
    [
        *("objective.any_step=-1", "objective.pixel_mse=.inf", "objective.pixel_floor=2"),
        *("training.batch=0", "training.steps=0", "training.minutes=0", "training.seed=-1"),
        *("training.max_bad_steps=1.5", "evaluation.steps=[0]", "evaluation.steps=[65]"),
        *("evaluation.pictures=-1", "backbone.timesteps=both", "backbone.branches=three"),
        *("engine.learning_rate=.nan", "engine.ema_decay=1", "feed.crop=0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(override: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe("ablations/full", [override])
    for name in override.split("=")[0].split("."):
        assert name in str(error.value)


def test_a_teacher_must_know_something() -> None:
    with pytest.raises(UsageError, match="set init"):
        load_recipe("ablations/teacher")


# ---------------------------------------------------------------- the plan


def test_variants_share_a_start_if_their_networks_are_alike(tmp_path: Path) -> None:
    found = planned(tmp_path)
    starts = [name for name in found if name.startswith("start")]
    assert starts == ["start", "start-single-branch", "start-summed-timesteps"]
    assert list(found)[:3] == starts and len(found) == 3 + len(variants())
    for name in variants():
        own = f"start-{name}" if f"start-{name}" in starts else "start"
        recipe = found[f"{name}-seed0"].recipe
        assert recipe.init == str(tmp_path / "runs" / own / "model")
        assert recipe.backbone_settings == found[own].recipe.backbone_settings
        assert recipe.training.minutes == 5 and recipe.data == "data"
    recipes = [found[name].recipe for name in starts]
    for recipe in recipes:
        assert recipe.init == "scratch" and recipe.training.minutes == 8
        assert recipe.objective == recipes[0].objective
        assert recipe.objective.flow_matching > 0 and recipe.objective.rectification == 0


def test_only_what_is_asked_for_is_planned(tmp_path: Path) -> None:
    names = list(planned(tmp_path, only="single-branch", seeds=(0, 3)))
    assert names == ["start-single-branch", "single-branch-seed0", "single-branch-seed3"]
    with pytest.raises(UsageError, match="Known: full"):
        planned(tmp_path, only="dual-branch")


def test_seeds_change_weights_noise_and_the_stream(tmp_path: Path) -> None:
    found = planned(tmp_path, only="full", seeds=(0, 1))
    seen = {
        (one.recipe.training.seed, one.recipe.feed.seed)
        for one in found.values()
        if one.variant == "full"
    }
    assert seen == {(0, 1), (1, 2)}
    assert found["start"].recipe.feed.seed == 0  # none goes over the start's pairs again


def test_overrides_lie_beneath_what_variants_change(tmp_path: Path) -> None:
    overrides = ("objective.rectification=0.7", "backbone.width=32", "training.batch=4")
    found = planned(tmp_path, Budget("data", "pairs", 5, 8, overrides))
    assert found["full-seed0"].recipe.objective.rectification == 0.7
    assert found["no-self-adversarial-seed0"].recipe.objective.rectification == 0
    assert found["start"].recipe.objective.rectification == 0
    for one in found.values():
        assert one.recipe.backbone_settings.width == 32 and one.recipe.training.batch == 4


# ---------------------------------------------------------------- the table


def outcome(variant: str, seed: int, psnr: float, lpips: float | None = 0.25) -> Outcome:
    def means(gain: float) -> dict[str, float | None]:
        return {"psnr_y": psnr + gain, "ssim_y": 0.7, "lpips": lpips, "niqe": 6.0}

    figures = {
        "bicubic": {"psnr_y": 24.0, "ssim_y": 0.6, "lpips": lpips, "niqe": 8.0},
        "1 step": means(0),
        "4 steps": means(-0.5),
        "4 steps, even levels": means(-1),
    }
    return Outcome(variant, seed, 1_040_000, 2_080_000, 100, 1600, 80.0, 700 + seed, figures)


def test_the_table_gives_mean_and_spread_over_seeds() -> None:
    text = markdown([outcome("full", 0, 26.0), outcome("full", 1, 26.2), outcome("teacher", 0, 25)])
    lines = text.splitlines()
    assert (
        "| full | 0, 1 | 1.04 ± 0.00 | 2.08 ± 0.00 | 700 ± 1 | 20.0 ± 0.0 | 1600 ± 0 | 1.3 ± 0.0 |"
        in lines
    )
    psnr = next(i for i, line in enumerate(lines) if line.startswith("| PSNR-Y"))
    assert lines[psnr] == "| PSNR-Y in dB ↑ | 1 step | 4 steps | 4 steps, even levels |"
    assert lines[psnr + 2] == "| full | 26.10 ± 0.14 | 25.60 ± 0.14 | 25.10 ± 0.14 |"
    assert lines[psnr + 3] == "| teacher | 25.00 | 24.50 | 24.00 |"
    assert "Bicubic: 24.00." in lines


def test_what_was_not_measured_is_no_number() -> None:
    outcomes = [outcome("full", 0, 26.0, lpips=None), outcome("full", 1, 26.0)]
    text = markdown(outcomes)
    row = text[text.index("LPIPS") :].splitlines()[2]
    assert row.startswith("| full | not measured |")
    none = [outcome("full", 0, 26.0, lpips=None)]
    assert "Not measured: LPIPS." in markdown(none) and "| LPIPS" not in markdown(none)
    rows = list(csv.DictReader(io.StringIO(to_csv(outcomes))))
    assert len(rows) == 8 and rows[1]["lpips"] == "" and rows[5]["lpips"] == "0.250000"


def test_csv_holds_every_figure() -> None:
    (row, *_) = list(csv.DictReader(io.StringIO(to_csv([outcome("full", 3, 26.0)]))))[1:]
    assert row == {
        **{"variant": "full", "seed": "3", "system": "1 step", "psnr_y": "26.000000"},
        **{"ssim_y": "0.700000", "lpips": "0.250000", "niqe": "6.000000"},
        **{"parameters": "1040000", "held": "2080000", "steps": "100", "samples": "1600"},
        **{"seconds": "80", "samples_per_second": "20", "peak_mb": "703"},
    }


# ---------------------------------------------------------------- the command


def test_a_dry_run_lists_the_trainings_and_mistakes_are_told(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    given = ("ablate", "--data", "hr", "--pairs", "pairs", "--out", "out")
    chosen = ("--dry-run", "--only", "full,teacher", "--minutes", "3", "--seeds", "0,2")
    code, told, _ = run(*given, *chosen)
    assert code == 0 and not list(tmp_path.iterdir())
    for line in ("start: 1200 steps from", "full-seed0: 3 min from", "teacher-seed2: 3 min"):
        assert line in told
    for wrong, part in (
        (("--only", "ful"), "Known: full"),
        (("--seeds", "one"), "--seeds one"),
        (("--seeds", "-1"), "training.seed"),
        (("objective.rectificaton=1",), "Did you mean 'rectification'"),
        (("training.minutes=3",), "either minutes or steps"),
        ((), "hr is not a dataset"),
    ):
        code, _, told = run(*given, *wrong)
        assert code == 2 and part in told and len(told.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- for real


TINY = (
    *("training.minutes=null", "training.steps=2", "training.batch=4", "feed.crop=32"),
    *("backbone.width=32", "backbone.depth=1", "backbone.local_width=8", "backbone.stem_depth=0"),
    *("backbone.head_depth=0", "evaluation.steps=[1]", "evaluation.pictures=0"),
)


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_two_variants_from_one_start(
    tmp_path: Path, photo: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, measured, recorded and kept; the teacher's three networks train in one engine."""
    from mlflow import MlflowClient

    from pipelines.ingest import ingest
    from pipelines.synthesize import synthesize

    monkeypatch.setenv("TEASR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.png").write_bytes(encode(photo(80, 80, i)))
    ingest(["photos"], "hr")
    synthesize("hr", "pairs", crop=64)
    budget = Budget("hr", "pairs", overrides=TINY)
    folder = tmp_path / "out"
    outcomes = ablate(budget, folder, ["teacher", "full"])
    assert [one.variant for one in outcomes] == ["start", "full", "teacher"]
    full, teacher = outcomes[1:]
    assert full.held == 2 * full.parameters and teacher.held == 5 * teacher.parameters
    for one in outcomes:
        assert one.samples == 8 and one.peak_mb > 100
        figures = one.figures["1 step"]
        assert figures["psnr_y"] > 5 and 0 < figures["ssim_y"] < 1 and "bicubic" in one.figures
    assert "| teacher | 0 |" in (folder / "ablations.md").read_text()
    assert len((folder / "ablations.csv").read_text().splitlines()) == 1 + 3 * 2

    client = MlflowClient(f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}")
    run_id = json.loads((folder / "runs" / "teacher-seed0" / "run.json").read_text())["run_id"]
    run = client.get_run(run_id)
    assert run.data.tags["ablation"] == "teacher" and run.data.tags["seed"] == "0"
    assert run.data.metrics["evaluation/psnr_y/1 step"] == teacher.figures["1 step"]["psnr_y"]
    assert run.data.metrics["training/peak_mb"] == pytest.approx(teacher.peak_mb)
    recorded = json.loads((folder / "runs" / "teacher-seed0" / "model" / "model.json").read_text())
    assert Recipe.model_validate(recorded["training"]["recipe"]).objective.teacher

    weights = list(folder.rglob("model.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in weights]
    assert ablate(budget, folder, ["full"]) == outcomes  # kept, and the table keeps the others
    assert stamps == [path.stat().st_mtime_ns for path in weights]
    other = Budget("hr", "pairs", overrides=(*TINY, "objective.any_step=0.5"))
    with pytest.raises(UsageError, match="another 'overrides'"):
        ablate(other, folder, ["full"])
