"""The cluster files are what Ray takes, and its autoscaler starts the nodes that it should."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from tests.chaos.nodes import KEEPALIVE, SHARE_EXPIRES, SPOT_NOTICE

ROOT = Path(__file__).parent.parent
FILES = ["cluster.yaml", "deploy/gcp.yaml", "deploy/on-premise.yaml"]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_files_pass_the_launchers_schema(name: str) -> None:
    config = prepare_config(read(name))
    validate_config(config)
    assert config["available_node_types"][config["head_node_type"]]


@pytest.mark.parametrize("name", FILES)
def test_nodes_install_this_projects_wheel_and_one_release_of_ray(name: str) -> None:
    config = read(name)
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"', project, re.M)
    assert version
    wheel = f"teasr-{version[1]}-py3-none-any.whl"
    mounted = config["file_mounts"]
    assert mounted[f"~/{wheel}"] == f"dist/{wheel}"
    made = {f"dist/{wheel}", "~/.ray/auth_token"}
    assert made <= set(mounted.values())
    assert all((ROOT / local).is_file() for local in set(mounted.values()) - made)
    install = config["setup_commands"][-1]
    assert f"~/{wheel}[cluster" in install and "-c ~/constraints.txt" in install
    pinned = re.search(r"ray==(\S+)", install)
    assert pinned and f"ray=={pinned[1]}" in DOCKERFILE and wheel in DOCKERFILE
    assert ray.__version__.split(".")[0] == pinned[1].split(".")[0]


def machines() -> dict[str, dict[str, Any]]:
    """The two clouds; of AWS's machines with what the launcher asks AWS for."""
    aws, gcp = (prepare_config(read(name)) for name in FILES[:2])
    found = {"data": {"CPU": 32}, "train-spot": {"CPU": 48, "GPU": 4}}
    found["train-on-demand"] = found["train-spot"]
    for name, resources in found.items():
        aws["available_node_types"][name]["resources"] |= resources
    return {"aws": aws, "gcp": gcp}


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
@pytest.mark.parametrize(
    ("bundle", "count", "failed", "launched"),
    [
        ({"CPU": 1}, 40, (), {"data": 2}),
        ({"CPU": 1, "teasr_data": 0.001}, 200, (), {"data": 7}),
        ({"GPU": 1, "CPU": 1}, 8, (), {"train-spot": 2}),
        ({"CPU": 40, "teasr_training": 0.001}, 2, (), {"train-spot": 2}),
        ({"GPU": 1, "CPU": 1}, 8, ("train-spot",), {"train-on-demand": 2}),
        ({"GPU": 1}, 32, (), {"train-spot": 4, "train-on-demand": 4}),
    ],
    ids=["CPUs", "data", "spot", "training without GPUs", "no spot to have", "more than spot"],
)
def test_autoscaler_takes_cpu_nodes_for_data_and_spot_before_on_demand(
    cloud: str,
    bundle: dict[str, float],
    count: int,
    failed: tuple[str, ...],
    launched: dict[str, int],
) -> None:
    config = AutoscalingConfig(machines()[cloud], skip_content_hash=True)
    demands = [ResourceRequestUtil.make(bundle) for _ in range(count)]
    request = SchedulingRequest(
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_worker_nodes(),
        disable_launch_config_check=True,
        resource_requests=ResourceRequestUtil.group_by_count(demands),
        recoverable_resource_availabilities=dict.fromkeys(failed, 0.0),
    )
    reply = ResourceDemandScheduler(None).schedule(request)
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == launched
    assert not reply.infeasible_resource_requests


def test_data_nodes_have_no_gpu_and_the_head_runs_no_tasks() -> None:
    for config in machines().values():
        types = config["available_node_types"]
        assert types["head"]["resources"] == {"CPU": 0}
        assert "GPU" not in types["data"]["resources"]


@pytest.mark.parametrize("name", FILES)
def test_dashboards_listen_on_loopback(name: str) -> None:
    assert "--dashboard-host=127.0.0.1" in read(name)["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", FILES)
def test_heads_look_after_connections_as_where_faults_are_tested(name: str) -> None:
    assert KEEPALIVE in shlex.split(read(name)["head_start_ray_commands"][-1])


def test_nodes_have_the_environment_in_which_faults_are_tested() -> None:
    lines = (ROOT / "deploy" / "nodes.env").read_text().splitlines()
    assert {f"export {name}={value}" for name, value in SHARE_EXPIRES.items()} <= set(lines)


@pytest.mark.parametrize(("name", "cloud"), [("cluster.yaml", "aws"), ("deploy/gcp.yaml", "gcp")])
def test_workers_in_clouds_listen_for_their_end(name: str, cloud: str) -> None:
    config = read(name)
    assert config["file_mounts"]["~/spot-notice.sh"] == str(SPOT_NOTICE.relative_to(ROOT))
    command = config["worker_start_ray_commands"][-1]
    assert f"bash ~/spot-notice.sh {cloud} $RAY_HEAD_IP:6379" in command and command.endswith("&")


@pytest.mark.parametrize(
    "linted", ["hadolint Dockerfile", "shellcheck mount-nvme.sh", "shellcheck spot-notice.sh"]
)
def test_linters_find_nothing(linted: str) -> None:
    program, file = linted.split()
    done = subprocess.run(
        [Path(sys.executable).parent / program, ROOT / "deploy" / file],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_image_is_built_in_stages_and_runs_as_nobody_special() -> None:
    stages = DOCKERFILE.split("\nFROM ")[1:]
    assert len(stages) == 2 and "COPY --from=build" in stages[1]
    assert "USER 1000:1000" in stages[1] and "COPY ." not in DOCKERFILE
