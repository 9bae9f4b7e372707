"""Models and engines for the tests. An engine takes seconds to start, so tests with equal settings share engines."""

import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import models
import servers
import versions
from driver import Engine, Nursery

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvferry" / "vllm"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run the long test: minutes of kills")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--soak"):
        skip = pytest.mark.skip(reason="a long test: runs with --soak only")
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(skip)


def pytest_report_header() -> str:
    return f"vLLM {versions.running()} in {versions.package_directory()}"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: a long test; runs with --soak only")


@pytest.fixture(scope="session")
def tiny() -> str:
    return str(models.make("tiny", CACHE / "models" / "tiny-1"))


@pytest.fixture(scope="session")
def tiny_window() -> str:
    return str(models.make("tiny-window", CACHE / "models" / "tiny-window-1"))


@pytest.fixture(scope="session")
def smollm2() -> str:
    return str(models.make("smollm2", CACHE / "models" / "smollm2-1"))


def transfer(role: str, policy: str = "recompute", **extra: Any) -> dict[str, Any]:
    return {**servers.kvferry_config(role, **extra), "kv_load_failure_policy": policy}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Adds kvferry's last lines of the engines' logs to the report of a failed test."""
    report = yield
    if report.failed:
        logs = getattr(item.config, "engine_logs", None)
        for log in sorted(logs.glob("*.log")) if logs else ():
            lines = [line for line in log.read_text(errors="replace").splitlines() if KVFERRY.search(line)]
            if lines:
                report.sections.append((f"kvferry in {log.name}", "\n".join(lines[-20:])))
    return report


KVFERRY = re.compile(r"kvferry(:| is )|(WARN|ERROR) kvferry")

Start = Callable[..., Engine]


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    given = os.environ.get("KVFERRY_TEST_LOGS")
    path = Path(given) if given else tmp_path_factory.mktemp("engines")
    path.mkdir(parents=True, exist_ok=True)
    pytestconfig.engine_logs = path  # type: ignore[attr-defined]
    return path


@pytest.fixture(scope="session")
def nursery(log_dir: Path) -> Iterator[Nursery]:
    nursery = Nursery(log_dir / "nursery.log")
    yield nursery
    nursery.close()


def starter(log_dir: Path, nursery: Nursery) -> Iterator[Start]:
    started: list[Engine] = []

    def start(name: str, model: str, role: str | None = None, **more: Any) -> Engine:
        """Starts an engine without waiting for it; `ready()` waits. `role=None`: without a connector."""
        spec: dict[str, Any] = {"model": model}
        spec.update({k: more.pop(k) for k in ("llm", "cache") if k in more})
        if role:
            spec["transfer"] = more.pop("transfer", None) or transfer(role, **more)
        label = f"{len(list(log_dir.iterdir())):02d}-{name}"
        engine = Engine(label, spec, log_dir, nursery)
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.close()


@pytest.fixture
def start(log_dir: Path, nursery: Nursery) -> Iterator[Start]:
    yield from starter(log_dir, nursery)


@pytest.fixture(scope="module")
def start_shared(log_dir: Path, nursery: Nursery) -> Iterator[Start]:
    yield from starter(log_dir, nursery)


def prompt(seed: int, length: int, low: int = 4, high: int = 259) -> list[int]:
    """Random tokens: two prompts share no block."""
    r = random.Random(seed)
    return [r.randrange(low, high) for _ in range(length)]


class Fleet:
    """A prefill engine, a decode engine and an engine without a connector, all with one model."""

    def __init__(self, start: Start, model: str, label: str, vocab: tuple[int, int], cache: int = 64 << 20) -> None:
        self.vocab = vocab
        self._seed = 0
        self.p = start(f"{label}-prefill", model, "kv_producer", cache=cache)
        self.d = start(f"{label}-decode", model, "kv_consumer", cache=cache)
        self.mono = start(f"{label}-mono", model, cache=cache)
        for engine in (self.p, self.d, self.mono):
            engine.ready()
        self.free = (self.p.state()["free"], self.d.state()["free"])

    def prompt(self, length: int) -> list[int]:
        """A prompt that no test has used yet."""
        self._seed += 1
        return prompt(self._seed, length, *self.vocab)

    def alone(self, tokens: list[int], max_tokens: int = 16) -> list[int]:
        """The answer of an engine without a connector."""
        self._seed += 1
        return self.mono.generate(f"mono-{self._seed}", tokens, max_tokens=max_tokens)["tokens"]

    def alone_at_once(self, prompts: list[list[int]]) -> list[list[int]]:
        """The answers of an engine without a connector, in one batch."""
        self._seed += 1
        for i, tokens in enumerate(prompts):
            self.mono.add(f"mono-{self._seed}-{i}", tokens)
        return [self.mono.wait("done", f"mono-{self._seed}-{i}")["tokens"] for i in range(len(prompts))]

    def settled(self) -> None:
        """Waits until both engines are idle, and checks that all their blocks are free."""
        free = (self.p.settled()["free"], self.d.settled()["free"])
        assert free == self.free, f"blocks are lost: {free} are free, {self.free} were free at the start"


@pytest.fixture(scope="session")
def start_session(log_dir: Path, nursery: Nursery) -> Iterator[Start]:
    yield from starter(log_dir, nursery)


@pytest.fixture(scope="session")
def tiny_fleet(start_session: Start, tiny: str) -> Fleet:
    return Fleet(start_session, tiny, "tiny", (4, 259))
