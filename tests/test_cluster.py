"""`cluster.yaml` is what Ray's cluster launcher accepts."""

from __future__ import annotations

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent


def test_cluster_file_passes_the_launchers_schema() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    assert config["available_node_types"][config["head_node_type"]]


def test_what_is_mounted_leaves_environments_behind() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert {".venv", ".git"} <= set(config["rsync_exclude"])
