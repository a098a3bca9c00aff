"""The manifests keep their promises: our command, no secrets in them, nothing that runs as root."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from jobs.cli import app
from jobs.locks import Busy
from jobs.preemption import Preempted
from teasr.errors import TeasrError, UsageError
from tests.chaos.nodes import KEEPALIVE

FOLDER = Path(__file__).parent.parent / "deploy" / "kubernetes"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


CRON = manifest("retrain-cronjob.yaml")
RAY = manifest("retrain-raycronjob.yaml")
STANDING = manifest("raycluster.yaml")
JOB = manifest("rayjob.yaml")
POD = CRON["spec"]["jobTemplate"]["spec"]["template"]["spec"]
CLUSTER = RAY["spec"]["jobTemplate"]["rayClusterSpec"]
PODS = [
    POD,
    CLUSTER["headGroupSpec"]["template"]["spec"],
    *(group["template"]["spec"] for group in CLUSTER["workerGroupSpecs"]),
]


def test_all_manifests_are_looked_at() -> None:
    names = {
        *("retrain-cronjob.yaml", "retrain-raycronjob.yaml", "raycluster.yaml", "rayjob.yaml"),
    }
    assert {path.name for path in FOLDER.iterdir()} == names
    assert (CRON["apiVersion"], CRON["kind"]) == ("batch/v1", "CronJob")
    assert (RAY["apiVersion"], RAY["kind"]) == ("ray.io/v1", "RayCronJob")
    assert CRON["spec"]["concurrencyPolicy"] == "Forbid"
    # What KubeRay's RayCronJob and the RayJob in it have.
    assert {*RAY["spec"]} <= {"schedule", "timeZone", "suspend", "jobTemplate"}
    assert {*RAY["spec"]["jobTemplate"]} <= {
        *("entrypoint", "backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes"),
        *("ttlSecondsAfterFinished", "rayClusterSpec"),
    }


@pytest.mark.parametrize(
    "command",
    [
        POD["containers"][0]["command"],
        shlex.split(RAY["spec"]["jobTemplate"]["entrypoint"]),
        shlex.split(JOB["spec"]["entrypoint"]),
    ],
)
def test_commands_are_ours(command: list[str]) -> None:
    program, name, *arguments = command
    assert program == "teasr"
    found = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    context = found.make_context(name, arguments)
    assert context.params["recipe"] == "/data/recipe.yaml"


def test_what_is_tried_again_is_what_may_end_otherwise() -> None:
    spec = CRON["spec"]["jobTemplate"]["spec"]
    by_action = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert by_action == {
        "FailJob": [TeasrError.exit_code, UsageError.exit_code],
        "Ignore": [Preempted.exit_code],
    }
    assert Busy.exit_code == Preempted.exit_code
    assert POD["restartPolicy"] == "Never"  # or there is no failure policy


@pytest.mark.parametrize("pod", PODS, ids=["cron", "head", "workers"])
def test_pods_have_few_rights_and_no_secrets(pod: dict[str, Any]) -> None:
    user = pod["securityContext"]
    assert user["runAsNonRoot"] and user["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        given = {variable["name"]: variable for variable in container["env"]}
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            assert "value" not in given[name] and "secretKeyRef" in given[name]["valueFrom"]
        assert given["TEASR_HOME"]["value"].startswith(
            next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "data")
        )
    assert not [text for text in texts(pod) if "@" in text]  # no user:password@ in a URL


def texts(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        part = part.values()
    elif not isinstance(part, list):
        yield str(part)
        return
    for inner in part:
        yield from texts(inner)


@pytest.mark.parametrize("cluster", [STANDING["spec"], CLUSTER], ids=["standing", "cron"])
def test_heads_look_after_connections_as_where_faults_are_tested(cluster: dict[str, Any]) -> None:
    given = cluster["headGroupSpec"]["rayStartParams"]["system-config"]
    assert shlex.split(f"--system-config={given}") == [KEEPALIVE]  # a shell reads it


def test_standing_cluster_is_the_one_that_jobs_name() -> None:
    assert (STANDING["apiVersion"], STANDING["kind"]) == ("ray.io/v1", "RayCluster")
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert JOB["spec"]["clusterSelector"] == {"ray.io/cluster": STANDING["metadata"]["name"]}
    spec = STANDING["spec"]
    assert spec["rayVersion"] == CLUSTER["rayVersion"]
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pods = [group["template"]["spec"] for group in spec["workerGroupSpecs"]]
    gpus = ["nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"] for pod in pods]
    assert gpus == [False, True]


@pytest.mark.parametrize(
    "pod",
    [
        STANDING["spec"]["headGroupSpec"]["template"]["spec"],
        *(group["template"]["spec"] for group in STANDING["spec"]["workerGroupSpecs"]),
        JOB["spec"]["submitterPodTemplate"]["spec"],
    ],
    ids=["head", "data", "train", "submitter"],
)
def test_pods_of_the_standing_cluster_have_few_rights(pod: dict[str, Any]) -> None:
    user = pod["securityContext"]
    assert user["runAsNonRoot"] and user["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        for variable in container["env"]:
            assert "PASSWORD" not in variable["name"] or "value" not in variable
        memory = container["resources"]
        assert memory["requests"]["memory"] == memory["limits"]["memory"]
