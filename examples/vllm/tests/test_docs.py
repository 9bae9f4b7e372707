"""`docs/vllm.md` names what the code has."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from prometheus_client import Counter, Gauge, Histogram

from kvferry.vllm.options import Options
from kvferry.vllm.stats import KvFerryPromMetrics

DOC = (Path(__file__).parents[3] / "docs" / "vllm.md").read_text()


def section(title: str) -> str:
    """The text of a section, without its subsections."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#)", re.sub(r"```.*?```", "", DOC, flags=re.S), re.S | re.M)
    assert found is not None, title
    return found[1]


def first_column(text: str) -> list[str]:
    """The code in the first column of a section's tables."""
    return [name for row in re.findall(r"^\| (`[^|]*) \|", text, re.M) for name in re.findall(r"`([^`]+)`", row)]


def registered() -> dict[str, list[str]]:
    """The metrics that the connector registers, with the labels that vLLM's own metrics do not have."""
    found: dict[str, list[str]] = {}

    class Metric:
        def __init__(self, name: str, labelnames: Sequence[str], **_: Any) -> None:
            found[name.removeprefix("vllm:kvferry_")] = [label for label in labelnames if label != "engine"]

        def labels(self, *_: Any) -> "Metric":
            return self

        def set(self, _: float) -> None:
            pass

    KvFerryPromMetrics(MagicMock(), {kind: Metric for kind in (Gauge, Counter, Histogram)}, ["engine"], {0: ["0"]})
    return found


def test_every_metric_is_documented_and_every_documented_metric_exists() -> None:
    metrics, text = registered(), section("Metrics and logs")
    documented = first_column(text)
    assert documented.pop(0) == "vllm:kvferry_…"
    assert sorted(documented) == sorted(metrics)
    for name, labels in metrics.items():
        row = next(line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1])
        assert all(f"`{label}`" in row for label in labels), row


def test_every_option_is_documented_and_every_documented_option_exists() -> None:
    assert sorted(first_column(section("Options"))) == sorted(Options.__dataclass_fields__)


def test_the_configurations_in_commands_are_valid() -> None:
    configurations = re.findall(r"--kv-transfer-config '(.*?)'", DOC, re.S)
    assert len(configurations) >= 6
    for text in configurations:
        configuration = json.loads(text)
        assert configuration["kv_connector"] == "KvFerryConnector"
        assert set(configuration.get("kv_connector_extra_config", {})) <= set(Options.__dataclass_fields__)
