"""Models and engines for the tests. Engines are dear (10 s each), so that most tests share one pair."""

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
from driver import Engine, Nursery

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvferry" / "vllm"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also the long runs: kills for minutes, comparisons")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--soak"):
        skip = pytest.mark.skip(reason="a long run: give --soak")
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(skip)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: takes minutes; runs with --soak only")


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
    return {
        "kv_connector": "KvFerryConnector",
        "kv_connector_module_path": "kvferry.vllm",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": extra,
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """A test that fails shows what kvferry said last in the engines' logs."""
    report = yield
    if report.failed:
        logs = getattr(item.config, "engine_logs", None)
        for log in sorted(logs.glob("*.log")) if logs else ():
            said = [line for line in log.read_text(errors="replace").splitlines() if SAID.search(line)]
            if said:
                report.sections.append((f"kvferry in {log.name}", "\n".join(said[-20:])))
    return report


SAID = re.compile(r"kvferry(:| is )|(WARN|ERROR) kvferry")

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
        """Starts an engine; it is `ready()` some seconds later. `role=None`: without a connector."""
        spec: dict[str, Any] = {"model": model}
        spec.update({k: more.pop(k) for k in ("llm", "cache") if k in more})
        if role:
            spec["transfer"] = more.pop("transfer", None) or transfer(role, **more)
        ranks = spec.get("llm", {}).get("tensor_parallel_size", 1)
        label = f"{len(list(log_dir.iterdir())):02d}-{name}"
        engine = Engine(label, spec, log_dir, nursery if ranks == 1 else None)
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
    """Random tokens: no two prompts share a block."""
    r = random.Random(seed)
    return [r.randrange(low, high) for _ in range(length)]


class Fleet:
    """A prefill engine, a decode engine and one without a connector, of one model."""

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
        """A prompt that no test had before."""
        self._seed += 1
        return prompt(self._seed, length, *self.vocab)

    def alone(self, tokens: list[int], max_tokens: int = 16) -> list[int]:
        """What an engine without a connector answers."""
        self._seed += 1
        return self.mono.generate(f"mono-{self._seed}", tokens, max_tokens=max_tokens)["tokens"]

    def settled(self) -> None:
        """Both engines hold nothing any more."""
        free = (self.p.settled()["free"], self.d.settled()["free"])
        assert free == self.free, f"blocks are lost: {free} are free, {self.free} were"


@pytest.fixture(scope="session")
def start_session(log_dir: Path, nursery: Nursery) -> Iterator[Start]:
    yield from starter(log_dir, nursery)


@pytest.fixture(scope="session")
def tiny_fleet(start_session: Start, tiny: str) -> Fleet:
    return Fleet(start_session, tiny, "tiny", (4, 259))
