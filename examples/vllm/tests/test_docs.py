"""`docs/vllm.md` names what the code has."""

import json
import re
from pathlib import Path

from kvferry.vllm import stats
from kvferry.vllm.options import Options

DOC = (Path(__file__).parents[3] / "docs" / "vllm.md").read_text()


def section(title: str) -> str:
    """The text of a section, without its subsections."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#)", re.sub(r"```.*?```", "", DOC, flags=re.S), re.S | re.M)
    assert found is not None, title
    return found[1]


def first_column(text: str) -> list[str]:
    """The code in the first column of a section's tables."""
    return [name for row in re.findall(r"^\| (`[^|]*) \|", text, re.M) for name in re.findall(r"`([^`]+)`", row)]


def test_every_metric_is_documented_and_every_documented_metric_exists() -> None:
    names = {name for name, _, _ in stats.COUNTERS.values()} | {name for name, _ in stats.GAUGES} | {"transfer_seconds", "up"}
    documented = first_column(section("Metrics and logs"))
    assert documented.pop(0) == "vllm:kvferry_…"
    assert sorted(documented) == sorted(names)
    # The labels too.
    for name, _, label in stats.COUNTERS.values():
        row = next(line for line in DOC.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1])
        assert label is None or f"`{label}`" in row, row


def test_every_option_is_documented_and_every_documented_option_exists() -> None:
    assert sorted(first_column(section("Options"))) == sorted(Options.__dataclass_fields__)


def test_the_configurations_in_commands_are_valid() -> None:
    configurations = re.findall(r"--kv-transfer-config '(.*?)'", DOC, re.S)
    assert len(configurations) >= 6
    for text in configurations:
        configuration = json.loads(text)
        assert configuration["kv_connector"] == "KvFerryConnector"
        assert set(configuration.get("kv_connector_extra_config", {})) <= set(Options.__dataclass_fields__)
