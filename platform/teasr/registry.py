"""Versions of models and where their weights are. Over MLflow's registry.

A version's weights are safetensors and JSON inside a pyfunc model that is text (no pickle). Of a
pretrained backbone they are what was trained, with a reference to the frozen base, never the base
itself. A new version has the alias `challenger`; what becomes of it is in `teasr.promotion`.

MLflow takes seconds to import and is imported on use only.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import yaml

from teasr.backbones.folder import DESCRIPTION_FILE, base_of, built_in_models, model_files
from teasr.errors import TeasrError, UsageError
from teasr.evaluation import Evaluation, summary_rows
from teasr.tracking import connect, git_commit, home, keep_mlflow_quiet, store_exists

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.models import Model, ModelSignature

CHALLENGER = "challenger"
TURNS = ".turns"
"""How the name of what is no model ends: the queue of changes of one, see `teasr.promotion`."""
EVALUATION_FILE = "evaluation.json"

_LOADER = "mlflow.pyfunc.loaders.code_model"
_REQUIRED = (
    "mlflow",
    "torch",
    "numpy",
    "safetensors",
    "pydantic",
    "pyyaml",
    "pillow",
    "opencv-python-headless",
)
_REQUIRED_BY_PRETRAINED = ("diffusers",)

# ---------------------------------------------------------------- models in


def signature() -> ModelSignature:
    """One row per picture: `image` in base64 becomes `image`, `width`, `height`, `version`.

    The restored `image` is a PNG in base64. Parameters: `steps`, `seed`, `tile` as in
    `RestorationSettings`.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    from teasr.restoration import RestorationSettings

    known = RestorationSettings.model_fields
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "image"),
                ColSpec(DataType.long, "width"),
                ColSpec(DataType.long, "height"),
                ColSpec(DataType.string, "version"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec(name, DataType.long, known[name].default)
                for name in ("steps", "seed", "tile")
            ]
        ),
    )


def log_model(client: MlflowClient, run_id: str, folder: Path, name: str = "model") -> str:
    """Log the weights in `folder` as a model of the run, with all code that serving needs.

    Weights that were logged with this run before are not logged again: an interrupted call is
    repeated.

    Args:
        folder: a model's, see `teasr.backbones.folder`; what else lies there is left out.
        name: of the logged model, shown in MLflow's pages.

    Returns:
        The model's URI, `models:/m-...`.

    Raises:
        UsageError: when `folder` holds no model.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    tags = {"teasr.sha256": weights_sha256(folder)}
    if base := base_of(folder):
        tags["teasr.base"] = f"{base.source} {base.revision or ''}".strip()
        tags["teasr.base_fingerprint"] = base.fingerprint
    run = client.get_run(run_id)
    for output in run.outputs.model_outputs if run.outputs else []:
        there = client.get_logged_model(output.model_id)
        if (there.name, there.tags.get("teasr.sha256")) == (name, tags["teasr.sha256"]):
            return f"models:/{there.model_id}"
    # Not `mlflow.pyfunc.log_model`, which puts models into the process's active experiment, by
    # default a folder `mlruns` in the current one, whatever experiment the run belongs to.
    logged = client.create_logged_model(
        run.info.experiment_id,
        name,
        source_run_id=run_id,
        tags=tags,
    )
    try:
        with tempfile.TemporaryDirectory() as temporary:
            description = Model(run_id=run_id, model_id=logged.model_id)
            save_model(folder, Path(temporary) / "model", mlflow_model=description)
            client.log_model_artifacts(logged.model_id, f"{temporary}/model")
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return f"models:/{logged.model_id}"


def save_model(folder: Path, destination: Path, mlflow_model: Model | None = None) -> None:
    """Write the weights in `folder` as an MLflow model at `destination`, which must not exist.

    Args:
        mlflow_model: what MLflow shall note about it; default: nothing.

    Raises:
        UsageError: when `folder` holds no model.
    """
    keep_mlflow_quiet()
    import mlflow

    files = model_files(folder)
    package = Path(__file__).parent
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        # An input example would have MLflow run the model, to guess the signature that we state.
        warnings.simplefilter("ignore", UserWarning)
        # Without the built-in models: each version would carry them all.
        code = Path(temporary) / package.name
        shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__", "weights"))
        # MLflow names an artifact by its last part alone: one of a model's folders goes whole.
        model = Path(temporary) / "model"
        for name in files:
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, model / name)
        mlflow.pyfunc.save_model(
            path=str(destination),
            python_model=str(package / "serving_model.py"),
            artifacts={path.name: str(path) for path in model.iterdir()},
            code_paths=[str(code)],
            signature=signature(),
            pip_requirements=_requirements(folder),
            mlflow_model=mlflow_model,
        )


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights and of their description, which decides how they are read.

    Errors as of `teasr.backbones.folder.model_files`.
    """
    total = hashlib.sha256()
    for name in model_files(folder):
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def store_evaluation(client: MlflowClient, run_id: str, evaluation: Evaluation) -> None:
    """Put `evaluation.json`, `evaluation.csv` and the means (`eval/1_step/psnr_y`) into the run."""
    client.log_text(run_id, evaluation.to_csv(), "evaluation.csv")
    for system, means in summary_rows(evaluation):
        for metric, value in means.items():
            if value is not None:
                client.log_metric(run_id, f"eval/{system.replace(' ', '_')}/{metric}", value)
    client.log_text(run_id, evaluation.to_json(), EVALUATION_FILE)


def register(
    client: MlflowClient,
    run_id: str,
    model_uri: str,
    name: str,
    evaluation: Evaluation,
    tags: Mapping[str, str | None],
) -> int:
    """Make the logged model the next version of `name` and its `challenger`.

    Registering the same model again returns the version that it has: an interrupted call is
    repeated.

    Args:
        model_uri: from `log_model`.
        evaluation: stored in the run, where `promote` finds it.
        tags: `dataset` (fingerprint), `recipe` (path), `commit`, ...; stored as `teasr.KEY`. None
            is left out. `benchmark` is taken from the evaluation, `commit` defaults to the code's.

    Returns:
        The version.

    Raises:
        UsageError: for an unknown model URI or a name that no `models:/` URI can hold.
    """
    from mlflow.exceptions import MlflowException

    if not re.fullmatch(r"[\w.-]+", name) or name.endswith(TURNS):
        raise UsageError(
            f"'{name}' cannot be a model's name.", "Use letters, digits, '.', '_' and '-'."
        )
    logged = _logged_model(client, model_uri)
    store_evaluation(client, run_id, evaluation)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    noted = ("sha256", "base", "base_fingerprint")
    given = {key: logged.tags.get(f"teasr.{key}") for key in noted}
    given |= {"commit": git_commit(), **tags}
    given["benchmark"] = evaluation.benchmark
    all_tags = {f"teasr.{key}": value for key, value in given.items() if value is not None}
    # MLflow's databases keep no model id with a version: the source tells.
    source = f"models:/{logged.model_id}"
    version = next((v for v in _versions(client, name) if v.source == source), None)
    if version is None:
        version = client.create_model_version(
            name,
            source=source,
            run_id=run_id,
            tags=all_tags,
            model_id=logged.model_id,
        )
    else:
        for key, value in all_tags.items():
            client.set_model_version_tag(name, str(version.version), key, value)
    client.set_registered_model_alias(name, CHALLENGER, str(version.version))
    return int(version.version)


# ---------------------------------------------------------------- models out


def resolve(model: str, client: MlflowClient | None = None) -> Path:
    """The folder of `model`'s weights (see `teasr.backbones.folder`) on this machine.

    Args:
        model: a folder of weights or of an MLflow model; a built-in model by name (which wins over
            a folder of that name: write `./NAME` for the folder); `models:/NAME@ALIAS`,
            `models:/NAME/VERSION`, `models:/MODEL_ID` or `runs:/RUN_ID/NAME`.
        client: default `connect()`, when MLflow is needed at all.

    Raises:
        UsageError: for what does not exist, with what does.
        TeasrError: for a model that is not safetensors and JSON, or changed since it was logged.
    """
    return checked_weights(find(model, client))


def describe(model: str, client: MlflowClient | None = None) -> str:
    """`model` for people: `teasr version 3`, `teasr-s (built in)`, or the folder."""
    return find(model, client).label


@dataclass
class Found:
    """A model's whereabouts.

    Attributes:
        label: for people, `teasr version 3`.
        location: a folder, or the URI of a remote artifact folder.
        sha256: the `weights_sha256` noted when the model was logged, outside the artifact store.
    """

    label: str
    location: str
    sha256: str | None = None

    def fetch(self) -> Path:
        """The folder on this machine; a remote one is downloaded once, into `home()`."""
        if urlsplit(self.location).scheme in ("", "file"):
            return _local_path(self.location)
        import mlflow

        # MLflow never writes a logged model twice, so its location names its content.
        target = home() / "downloads" / hashlib.sha256(self.location.encode()).hexdigest()[:16]
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as aside:
                whole = mlflow.artifacts.download_artifacts(self.location, dst_path=aside)
                with contextlib.suppress(OSError):  # another process was first
                    Path(whole).rename(target)
        return target


def find(model: str, client: MlflowClient | None = None) -> Found:
    """Look `model` up without downloading it. Arguments and errors as of `resolve`."""
    if model.startswith("models:/"):
        return _find_version(client or connect(), model)
    if model.startswith("runs:/"):
        client = client or connect()
        logged = _logged_model(client, model)
        return Found(f"{logged.name} of run {logged.source_run_id}", *_whereabouts(logged))
    built_in = built_in_models()
    if model in built_in:
        return Found(f"{model} (built in)", str(built_in[model]))
    if Path(model).is_dir():
        return Found(model, str(Path(model)))
    raise UsageError(f"There is no model '{model}'.", _what_exists(client))


def checked_weights(found: Found) -> Path:
    """The weights of `found` on this machine, compared with what was noted when they were logged.

    Raises:
        TeasrError: for a model that is not safetensors and JSON, or changed since it was logged.
    """
    weights = model_weights(found.fetch())
    if found.sha256 and weights_sha256(weights) != found.sha256:
        raise TeasrError(
            f"The weights of {found.label} are not those that were logged.",
            f"Their sha256 was {found.sha256}. Register a model that is whole.",
        )
    return weights


def list_versions(client: MlflowClient, name: str) -> dict[int, list[str]]:
    """Aliases by version, newest version first (`UsageError` for an unknown model)."""
    aliases = aliases_of(client, name)
    versions = sorted((int(v.version) for v in _versions(client, name)), reverse=True)
    return {v: sorted(alias for alias, held in aliases.items() if held == v) for v in versions}


# ---------------------------------------------------------------- versions and evaluations


def aliases_of(client: MlflowClient, name: str) -> dict[str, int]:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UsageError(f"No model '{name}' is registered.", _registered(client)) from None
    return {alias: int(version) for alias, version in found.aliases.items()}


def version_of(client: MlflowClient, name: str, version: int) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UsageError(
            f"'{name}' has no version {version}.", versions_for_people(client, name)
        ) from None


def _versions(client: MlflowClient, name: str) -> Iterator[ModelVersion]:
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def versions_for_people(client: MlflowClient, name: str) -> str:
    shown = [
        f"{version} ({', '.join(aliases)})" if aliases else str(version)
        for version, aliases in list_versions(client, name).items()
    ]
    return f"Versions: {', '.join(shown[:20]) or 'none'}."


def registered_models(client: MlflowClient) -> list[RegisteredModel]:
    """All models, by name, with their aliases; not the queues of changes."""
    found: list[RegisteredModel] = []
    token = None
    while True:
        page = client.search_registered_models(page_token=token)
        found += [model for model in page if not model.name.endswith(TURNS)]
        token = page.token
        if not token:
            return sorted(found, key=lambda model: model.name)


def _registered(client: MlflowClient) -> str:
    shown = []
    for model in registered_models(client)[:50]:
        aliases = [f"@{alias} = {version}" for alias, version in sorted(model.aliases.items())]
        shown.append(f"{model.name} ({', '.join(aliases)})" if aliases else model.name)
    return f"Registered: {', '.join(shown) or 'none'}."


def _what_exists(client: MlflowClient | None) -> str:
    built_in = f"Built in: {', '.join(built_in_models()) or 'none'}."
    registered = "Registered: none."
    if client or store_exists():  # asking must not create one
        try:
            registered = _registered(client or connect())
        except TeasrError as error:
            registered = str(error)
    return f"{built_in} {registered} Or give a folder, models:/NAME@ALIAS or models:/NAME/VERSION."


def evaluation_of(client: MlflowClient, version: ModelVersion) -> Evaluation | None:
    text = artifact_text(client, version, EVALUATION_FILE)
    return None if text is None else Evaluation.from_json(text)


def artifact_text(client: MlflowClient, version: ModelVersion, name: str) -> str | None:
    """The text of artifact `name` of the run that made a version; None when it is not there."""
    from mlflow.exceptions import MlflowException

    if not version.run_id:
        return None
    try:
        present = {file.path for file in client.list_artifacts(version.run_id)}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None  # the run was purged
    if name not in present:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(version.run_id, name, folder)).read_text()


def required_evaluation(client: MlflowClient, version: ModelVersion) -> Evaluation:
    evaluation = evaluation_of(client, version)
    if evaluation is None:
        raise TeasrError(
            f"Version {version.version} of '{version.name}' has no evaluation to judge by.",
            f"Evaluate models:/{version.name}/{version.version} first.",
        )
    return evaluation


# ---------------------------------------------------------------- folders


def _requirements(folder: Path) -> list[str]:
    """The installed versions of what serving imports, without local builds (`+cpu`)."""
    names = _REQUIRED if base_of(folder) is None else (*_REQUIRED, *_REQUIRED_BY_PRETRAINED)
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


def model_weights(folder: Path) -> Path:
    """The weights inside `folder`, which holds them itself or is an MLflow model of ours.

    Raises:
        UsageError: when it is neither.
        TeasrError: for an MLflow model of another kind: only safetensors and JSON are read.
    """
    if not (folder / "MLmodel").is_file():
        model_files(folder)
        return folder
    try:
        flavors = yaml.safe_load((folder / "MLmodel").read_text())["flavors"]
        pyfunc = flavors["python_function"]
        loader = pyfunc["loader_module"]
        weights = (folder / pyfunc["artifacts"][DESCRIPTION_FILE]["path"]).resolve().parent
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise _not_ours(folder) from None
    if set(flavors) != {"python_function"} or loader != _LOADER or "python_model" in pyfunc:
        raise _not_ours(folder)
    if not weights.is_relative_to(folder.resolve()) or not weights.is_dir():
        raise _not_ours(folder)
    ours = set(model_files(weights))
    found = [path for path in weights.rglob("*") if not path.is_dir()]
    strangers = sorted(
        [
            *(name for path in found if (name := path.relative_to(weights).as_posix()) not in ours),
            *(path.name for path in folder.glob("*.pkl")),
        ]
    )
    if strangers:
        raise TeasrError(
            f"{folder} holds files that teasr does not put into a model: {', '.join(strangers)}.",
            "Weights are read from safetensors and JSON only.",
        )
    return weights


def _not_ours(folder: Path) -> TeasrError:
    return TeasrError(
        f"{folder} is an MLflow model of another kind.",
        "Only models logged by teasr are read: safetensors and JSON, never a pickle.",
    )


def _local_path(location: str) -> Path:
    parts = urlsplit(location)
    return Path(url2pathname(parts.path) if parts.scheme == "file" else location)


def _find_version(client: MlflowClient, uri: str) -> Found:
    name, _, rest = uri.removeprefix("models:/").strip("/").partition("/")
    name, _, alias = name.partition("@")
    if not rest and not alias:
        if name.startswith("m-"):
            logged = _logged_model(client, uri)
            return Found(f"{logged.name} of run {logged.source_run_id}", *_whereabouts(logged))
        raise UsageError(
            f"'{uri}' names no version.",
            f"Write models:/{name}@ALIAS or models:/{name}/VERSION. "
            f"{versions_for_people(client, name)}",
        )
    aliases = aliases_of(client, name)
    if alias:
        if rest or alias not in aliases:
            raise UsageError(f"'{name}' has no alias '{alias}'.", versions_for_people(client, name))
        rest = str(aliases[alias])
    if not rest.isdigit():
        raise UsageError(f"'{rest}' is not a version.", versions_for_people(client, name))
    version = version_of(client, name, int(rest))
    label = f"{name} version {version.version}"
    if version.source and version.source.startswith("models:/m-"):
        return Found(label, *_whereabouts(_logged_model(client, version.source)))
    return Found(label, client.get_model_version_download_uri(name, rest))


def _whereabouts(logged: Any) -> tuple[str, str | None]:
    return logged.artifact_location, logged.tags.get("teasr.sha256")


def _logged_model(client: MlflowClient, uri: str) -> Any:
    """The `LoggedModel` of `models:/m-...` or `runs:/RUN/NAME`."""
    from mlflow.exceptions import MlflowException

    scheme, _, rest = uri.partition(":/")
    try:
        if scheme == "models":
            return client.get_logged_model(rest.strip("/"))
        run_id, _, name = rest.strip("/").partition("/")
        run = client.get_run(run_id)
        outputs = run.outputs.model_outputs if run.outputs else []
        logged = [client.get_logged_model(output.model_id) for output in reversed(outputs)]
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UsageError(f"There is no model '{uri}'.", _registered(client)) from None
    for model in logged:
        if name in ("", model.name):
            return model
    shown = ", ".join(f"runs:/{run_id}/{model.name}" for model in logged) or "none"
    raise UsageError(f"There is no model '{uri}'.", f"Models of the run: {shown}.")


def iso_time(milliseconds: int | None) -> str:
    return datetime.fromtimestamp((milliseconds or 0) / 1000, UTC).isoformat(timespec="seconds")
