"""Recipes: everything a distillation is made of, in one typed YAML file.

Each section's settings are declared beside the code that uses them. A recipe is given by path or by
the name of one that ships with the package. `extends: NAME` lays a recipe over another one beside
it, section by section.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.feed import FeedSettings
from teasr.backbones import PRESETS, DiTSettings, PretrainedSettings
from teasr.config import Settings, apply_overrides, read_yaml
from teasr.engine import EngineSettings
from teasr.errors import UsageError
from teasr.gate import GateSettings
from teasr.objective import ObjectiveSettings

RECIPES = Path(__file__).parent / "recipes"


class TrainingSettings(Settings):
    """How long and on what."""

    minutes: float | None = Field(None, gt=0)
    """Training time; time spent before an interruption counts. Give this or `steps`."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps. Give this or `minutes`."""
    batch: int = Field(16, ge=1)
    """Pairs per worker and micro-batch."""
    workers: int = Field(1, ge=1)
    """Ray Train workers."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest workers to go on with when machines go; as machines come back there are more again.
    None: all of `workers`, or wait for them."""
    gpu: bool = False
    """One GPU per worker."""
    cpus_per_worker: int = Field(1, ge=1)
    """Ray CPUs that a worker reserves; at least one in the cluster must stay free for the feed."""
    threads: int = Field(0, ge=0)
    """Threads of a worker's matrix products; 0 shares all cores but one among the workers."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between two records of losses."""
    checkpoint_minutes: float = Field(5.0, gt=0)
    """Time between two checkpoints."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept; a run goes on from the newest."""
    keep_best: int = Field(1, ge=0)
    """Models kept, apart from checkpoints, whose previews had the highest PSNR."""
    preview_minutes: float | None = Field(None, ge=0)
    """Time between two previews, which are not counted as training; None as `checkpoint_minutes`,
    0 makes none."""
    previews: int = Field(4, ge=1)
    """Pictures of a preview: pairs of the benchmark, or, without one, the first crop of each of the
    first photographs."""
    max_bad_steps: float = Field(0.05, ge=0, le=1)
    """Share of steps that may be left out because a loss was not finite; above it the run fails."""
    max_loss_growth: float | None = Field(None, gt=1)
    """A run fails when a term's mean over 50 steps is so many times the lowest such mean so far;
    None: never. Terms that play against each other may grow in a run that is well."""
    max_failures: int = Field(3, ge=0)
    """Worker failures that are answered by a restart from the last checkpoint."""
    max_silence_minutes: float = Field(30.0, gt=0)
    """A worker that made no step for so long is taken to hang, and ends; the time it takes to load
    and compile does not count."""
    seed: int = Field(0, ge=0)
    """Seed of weights, noise and times."""

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingSettings:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give either minutes or steps")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError("min_workers cannot be more than workers")
        return self

    @property
    def minutes_between_previews(self) -> float:
        """`preview_minutes`, filled in; 0 for none."""
        given = self.preview_minutes
        return self.checkpoint_minutes if given is None else given


class EvaluationSettings(Settings):
    """How the result is measured."""

    steps: tuple[int, ...] = (1, 4)
    """Numbers of sampling steps; 1 is always among them."""
    pictures: int = Field(4, ge=0)
    """Rows of the picture sheet."""
    crop: int = Field(256, ge=64, multiple_of=4)
    """Side in pixels of the HR crops of a benchmark that `teasr retrain` makes."""
    copies: int = Field(4, ge=1)
    """Crops per photograph kept for that benchmark."""

    @field_validator("steps")
    @classmethod
    def _with_one_step(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 1 <= steps <= 64 for steps in value):
            raise ValueError("numbers of steps between 1 and 64 are expected")
        return tuple(sorted({1, *value}))


_BESIDES = {"model", "data", "benchmark", "photos", "shrink", "held_out", "evaluation", "gate"}
"""Fields that training does not read; it knows the data by their fingerprint."""
_PLACEMENT = {
    *("offload_parameters", "offload_optimizer", "nvme_path", "stream_cache_gb"),
    "gradient_checkpointing",
}
"""Engine settings that change where numbers are and not which."""


class Recipe(Settings):
    """A distillation from data to promotion."""

    model: str = Field("teasr", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name under which versions are registered."""
    data: str | None = None
    """HR dataset to learn from (made by `teasr ingest`)."""
    benchmark: str | None = None
    """Pair dataset to measure on (made by `teasr synthesize`), never trained on."""
    photos: tuple[str, ...] = ()
    """Sources of photographs for `teasr retrain`, which makes `data` and `benchmark` from them."""
    shrink: Annotated[float, Field(ge=1)] | Literal["auto"] = 1.0
    """Factor by which `teasr retrain` shrinks photographs first, against their JPEG damage; `auto`
    decides for each."""
    held_out: float = Field(0.15, gt=0, lt=1)
    """Share of the photographs that `teasr retrain` keeps for the benchmark."""
    backbone: str | DiTSettings | PretrainedSettings = "teasr-s"
    """A native network, by a preset's name or its shape; or a pretrained one, by kind and source,
    with the adapters to train on it."""
    init: str = "scratch"
    """Weights to start from: `scratch`, a built-in model, a folder, or an MLflow model URI. On a
    pretrained backbone those of the adapters; `scratch` is then the base as it was published."""
    warm_start: bool = False
    """Whether `teasr retrain` starts from the champion, once there is one, and not from `init`."""
    lpips: str | None = None
    """LPIPS weights for the pixel term, a file or a folder; None looks at $TEASR_LPIPS."""
    feed: FeedSettings = FeedSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    engine: EngineSettings = EngineSettings()
    training: TrainingSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()

    @field_validator("backbone", mode="before")
    @classmethod
    def _form(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        pretrained = PretrainedSettings.model_fields.keys() & value.keys()
        form = PretrainedSettings if pretrained else DiTSettings
        try:  # here, so that an error names the field of this form and not of the other
            return form.from_mapping(value, "backbone")
        except UsageError as error:
            raise ValueError(str(error).removeprefix("backbone: ").rstrip(".")) from None

    @field_validator("backbone")
    @classmethod
    def _known_backbone(
        cls, value: str | DiTSettings | PretrainedSettings
    ) -> str | DiTSettings | PretrainedSettings:
        if isinstance(value, str) and value not in PRESETS:
            raise ValueError(
                f"one of {', '.join(PRESETS)}, or a mapping of settings, is expected; a pretrained "
                "backbone is a mapping with kind and source"
            )
        return value

    @property
    def backbone_settings(self) -> DiTSettings:
        """The native network's shape.

        Raises:
            UsageError: when the backbone is a pretrained one.
        """
        if isinstance(self.backbone, PretrainedSettings):
            raise UsageError(
                f"backbone: a native network is expected here, and this is a {self.backbone.kind}.",
                f"Set it to one of: {', '.join(PRESETS)}.",
            )
        return PRESETS[self.backbone] if isinstance(self.backbone, str) else self.backbone

    @property
    def trajectory(self) -> dict[str, Any]:
        """What decides what is learned, apart from the data: all but how far a run goes, where it
        runs, and what is recorded and measured of it."""
        left_out: dict[str, Any] = {
            "warm_start": not self.warm_start,  # runs begun before there was such a field go on
            "training": set(TrainingSettings.model_fields) - {"batch", "seed"},
            "engine": _PLACEMENT,
            **dict.fromkeys(_BESIDES, True),
        }
        return self.model_dump(mode="json", exclude=left_out)

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        pretrained = self.backbone if isinstance(self.backbone, PretrainedSettings) else None
        if self.objective.teacher and pretrained:
            raise ValueError(
                "objective.teacher is a comparison for native networks: it holds copies of one; "
                "leave it out, or set backbone to a native network"
            )
        if self.objective.teacher and self.init == "scratch":
            raise ValueError(
                "objective.teacher needs trained weights to start from, the teacher's; set init"
            )
        samples = self.training.batch * self.engine.gradient_accumulation
        if samples < self.objective.least_samples:
            raise ValueError(
                f"objective.passes=partitioned needs {self.objective.least_samples} samples per "
                f"worker and optimizer step, one for each role, and training.batch times "
                f"engine.gradient_accumulation is {samples}; raise one of them"
            )
        offload = self.engine.offload_parameters
        if (offload, self.objective.passes) == ("nvme", "sequential") and not (
            self.engine.gradient_checkpointing
        ):
            raise ValueError(
                "objective.passes=sequential with engine.offload_parameters=nvme needs "
                "engine.gradient_checkpointing=true: backward through several passes without it "
                "holds every parameter in memory"
            )
        if offload == "stream":
            if pretrained is None:
                raise ValueError(
                    "engine.offload_parameters=stream needs a pretrained backbone, whose frozen "
                    "weights are in files; a native network is trained whole"
                )
            if pretrained.frozen_bits:
                raise ValueError(
                    "backbone.frozen_bits does not go with engine.offload_parameters=stream: "
                    "weights that are streamed are computed with as they are stored"
                )
            if self.training.workers > 1:
                raise ValueError(
                    f"engine.offload_parameters=stream is for one worker, and training.workers is "
                    f"{self.training.workers}; engine.zero_stage=3 shards the weights over several"
                )
        if pretrained and pretrained.frozen_bits and self.engine.zero_stage == 3:
            raise ValueError(
                "backbone.frozen_bits does not go with engine.zero_stage=3, which cuts up plain "
                "tensors only; set one of them to another value"
            )
        return self


def recipe_names() -> list[str]:
    """Recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(
    name_or_path: str, overrides: Iterable[str] = (), *, beneath: Iterable[str] = (), **fixed: Any
) -> Recipe:
    """A recipe by path or shipped name, with `key=value` overrides and `fixed` top-level fields.

    Args:
        beneath: overrides of what the recipe extends, which its own values lie over.

    Raises:
        UsageError: an unknown recipe, or a wrong field, named.
    """
    path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise UsageError(
            f"There is no recipe '{name_or_path}'.",
            f"Give a YAML file or one of: {', '.join(recipe_names())}.",
        )
    data = apply_overrides({**_read(path, beneath), **fixed}, overrides)
    return Recipe.from_mapping(data, str(path))


def _read(path: Path, beneath: Iterable[str], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in `path`, laid over that of the recipe it extends."""
    data = read_yaml(path)
    name = data.pop("extends", None)
    if name is None:
        return apply_overrides(data, beneath)
    base = path.parent / f"{name}.yaml"
    if base in (path, *above) or not base.is_file():
        others = sorted(other.stem for other in path.parent.glob("*.yaml") if other != path)
        problem = "leads back to itself" if base.is_file() else "is not there"
        raise UsageError(
            f"{path}: 'extends': {base} {problem}.", f"Beside it are: {', '.join(others)}."
        )
    return _laid_over(_read(base, beneath, (path, *above)), data, str(path))


def _laid_over(base: dict[str, Any], data: dict[str, Any], source: str) -> dict[str, Any]:
    result = dict(base)
    for key, value in data.items():
        below = base.get(key)
        if not isinstance(value, dict) or below is None:
            result[key] = value
        elif isinstance(below, dict):
            result[key] = _laid_over(below, value, source)
        else:
            raise UsageError(
                f"{source}: '{key}' is a section here, and the value {below!r} in what it extends.",
                f"Write {key} out as a section there too.",
            )
    return result
