"""The files of deploy/monitoring: they load, and what they ask for exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.metrics import dashboards

from jobs import schedule_metrics
from pipelines import telemetry
from teasr.server.metrics import Metrics

FOLDER = Path(__file__).parents[1] / "deploy" / "monitoring"
RULES = FOLDER / "rules.yml"
CONFIG = FOLDER / "prometheus.yml"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "teasr.json"
UNITS = {
    *("short", "none", "percentunit", "percent", "bytes", "s", "reqps", "dateTimeFromNow"),
}
SEEN = {
    *("ray_object_store_used_memory", "ray_cluster_active_nodes"),
    "ray_node_disk_utilization_percentage",
}
"""In a Ray that runs (`tests/jobs/test_telemetry.py`), though none of its dashboards has them."""
_NAME = re.compile(r"(?<![\w:\"{=.])([a-z]\w*:[\w:]+|(?:ray|teasr|process)_\w+|up)(?![\w(\"=~])")


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def panels() -> list[dict[str, Any]]:
    return [p for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] != "row"]


def expressions() -> list[str]:
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    return asked + [rule["expr"] for rule in rules()]


def names(expression: str) -> set[str]:
    """The series that an expression asks for."""
    labels = re.compile(r"\{[^}]*\}|\b(by|on)\s*\([^)]*\)")
    return set(_NAME.findall(labels.sub(" ", expression)))


def of_server() -> set[str]:
    """What `teasr serve` tells, by its own text."""
    text = Metrics(lambda: 0, lambda: None, lambda: False)._registry  # type: ignore[arg-type,return-value]
    found = set()
    for family in text.collect():
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        found |= {family.name + ending for ending in endings.get(family.type, ("",))}
    return found


def of_ray() -> set[str]:
    """What Ray's own dashboards ask for, and what its exporter tells besides."""
    folder = Path(dashboards.__file__).parent
    text = "\n".join(path.read_text() for path in folder.glob("*.py"))
    return set(re.findall(r"ray_\w+", text)) | SEEN


def test_every_series_that_is_asked_for_exists() -> None:
    known = {figure.exported for figure in telemetry.FIGURES} | set(schedule_metrics.EXPORTED)
    known |= {rule["record"] for rule in rules() if "record" in rule} | {"up"}
    known |= of_server() | of_ray()
    asked = set().union(*map(names, expressions()))
    assert asked <= known, asked - known
    # And what the platform tells is looked at.
    own = {figure.exported for figure in telemetry.FIGURES} | set(schedule_metrics.EXPORTED)
    assert own <= asked, own - asked


def test_names_are_found_in_expressions() -> None:
    asked = (
        'sum by (stage) (ray_a_total{job="teasr_x"}) / stage:b:sum offset 1h and on (up) up == 0'
    )
    assert names(asked) == {"ray_a_total", "stage:b:sum", "up"}


def test_figures_are_described_once() -> None:
    figures = telemetry.FIGURES
    assert len({figure.name for figure in figures}) == len(figures)
    constants = [value for value in vars(telemetry).values() if isinstance(value, telemetry.Figure)]
    assert set(constants) == set(figures)
    for figure in figures:
        assert re.fullmatch(r"teasr_[a-z_]+", figure.name) and not figure.name.endswith("_total")
        assert figure.description.endswith(".")


def test_panels_have_titles_units_and_words() -> None:
    document = json.loads(DASHBOARD.read_text())
    identities = [panel["id"] for panel in document["panels"]]
    assert len(set(identities)) == len(identities) and document["uid"] == "teasr"
    for panel in panels():
        unit = panel["fieldConfig"]["defaults"]["unit"]
        assert unit in UNITS or unit.startswith(("suffix:", "prefix:")), panel["title"]
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    rows = [panel["title"] for panel in document["panels"] if panel["type"] == "row"]
    assert len(rows) == 5


def test_alerts_have_a_severity_and_a_sentence() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) >= 10
    for rule in alerts:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"]
    documented = (FOLDER.parents[1] / "docs" / "observability.md").read_text()
    assert all(rule["alert"] in documented for rule in alerts)


def test_prometheus_and_grafana_are_given_the_files() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    assert config["rule_files"] == [RULES.name]
    (source,) = yaml.safe_load(
        (FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    (provider,) = yaml.safe_load(
        (FOLDER / "grafana/provisioning/dashboards/teasr.yml").read_text()
    )["providers"]
    assert provider["type"] == "file" and provider["options"]["path"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", str(CONFIG)),
        ("check", "rules", str(RULES)),
        ("test", "rules", str(FOLDER / "rules.test.yml")),
    ],
    ids=["config", "rules", "alerts on made-up histories"],
)
def test_promtool_takes_them(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
