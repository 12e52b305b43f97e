"""Rules, alerts and the dashboard: they parse, they fire, they are explained, and they ask for what
the service measures.
"""

import json
import re
from pathlib import Path

import jsonschema
import yaml
from tools import DASHBOARD, ROOT, RULES, call, tool

MEASURED = set(re.findall(r"`(superbatch_\w+)`", (ROOT / "docs" / "metrics.md").read_text()))


def rules() -> list[dict]:
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def panels() -> list[dict]:
    return [
        panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"
    ]


def asked(query: str) -> set[str]:
    """The service's metrics that a query reads."""
    return {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in re.findall(r"(?<![:\w])superbatch_\w+", query)
    }


def test_rules_are_sound():
    call(tool("promtool"), "check", "rules", "--lint-fatal", RULES)


def test_alerts_fire_when_they_must():
    call(tool("promtool"), "test", "rules", Path(__file__).parent / "rules_test.yaml")


def test_every_alert_is_tried_both_ways():
    tried = yaml.safe_load((Path(__file__).parent / "rules_test.yaml").read_text())["tests"]
    tried = [one for test in tried for one in test["alert_rule_test"]]
    for alert in (rule["alert"] for rule in rules() if "alert" in rule):
        outcomes = {bool(one["exp_alerts"]) for one in tried if one["alertname"] == alert}
        assert outcomes == {True, False}, alert


def test_every_alert_has_its_page_in_the_runbook():
    headings = re.findall(
        r"^## (\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE
    )
    alerts = [rule for rule in rules() if "alert" in rule]
    assert [rule["alert"] for rule in alerts] == headings
    for rule in alerts:
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_rules_and_panels_ask_for_what_is_measured():
    queries = [rule["expr"] for rule in rules()]
    queries += [target["expr"] for panel in panels() for target in panel.get("targets", [])]
    unknown = {name for query in queries for name in asked(query)} - MEASURED
    assert not unknown
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for query in queries for name in re.findall(r"superbatch:[\w:]+", query)}
    assert used <= recorded


def test_panels_do_not_overlap_and_say_what_they_show():
    taken = set()
    for panel in panels():
        assert panel["description"], panel["title"]
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24 and not taken & cells, panel["title"]
        taken |= cells


def test_the_dashboard_fits_grafanas_schema():
    """The schema is made of the types of @grafana/schema 11.6.0 by ts-json-schema-generator,
    without descriptions.
    """
    schema = json.loads((Path(__file__).parent / "schemas" / "dashboard-grafana.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    dashboard = json.loads(DASHBOARD.read_text())
    assert [error.message for error in validator.iter_errors(dashboard)] == []
    dashboard["panels"][1]["gridPos"]["w"] = "six"
    assert list(validator.iter_errors(dashboard)), "the schema says nothing"
