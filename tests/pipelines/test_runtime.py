"""What is known of the Ray in use."""

from __future__ import annotations

import ray
from ray._private.worker import global_worker
from ray.core.generated.autoscaler_pb2 import ClusterConfig

from pipelines.runtime import capacity


def test_nodes_that_an_autoscaler_may_start_count(ray_session: None) -> None:
    before = capacity()
    assert before == ray.cluster_resources()
    config = ClusterConfig()
    group = config.node_group_configs.add(name="train", max_count=3)
    group.resources["GPU"] = 4
    global_worker.gcs_client.report_cluster_config(config.SerializeToString())
    try:
        assert capacity() == {**before, "GPU": 12}
    finally:
        global_worker.gcs_client.report_cluster_config(ClusterConfig().SerializeToString())
    assert capacity() == before
