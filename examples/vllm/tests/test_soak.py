"""A long test: a prefill engine that is killed every five seconds, and clients that disconnect."""

import random
import time

import pytest
from conftest import Fleet, Start
from driver import Dead, Engine
from servers import free_port

REQUESTS = 200
# Seconds from an engine's start to its kill.
LIFE = 5.0


class Prefill:
    """A prefill engine that is killed and restarted at one address."""

    def __init__(self, start: Start, model: str) -> None:
        self._start, self._model, self._port = start, model, free_port()
        self.lives = 0
        self._next()

    def _next(self) -> None:
        self.lives += 1
        self.engine = self._start(f"life-{self.lives}", self._model, "kv_producer", port=self._port)
        self._until: float | None = None

    def turn(self) -> None:
        """Kills the engine after `LIFE` seconds and starts a new one at once, which is ready some seconds later."""
        if self._until is None:
            try:
                self.engine.wait("ready", limit=0.001)
            except AssertionError:
                return
            self._until = time.monotonic() + LIFE
        if time.monotonic() > self._until:
            self.engine.kill()
            self._next()

    @property
    def alive(self) -> bool:
        return self._until is not None


def cpu_share(engine: Engine, seconds: float = 5) -> float:
    before, began = engine.state()["cpu"], time.monotonic()
    time.sleep(seconds)
    return (engine.state()["cpu"] - before) / (time.monotonic() - began)


@pytest.mark.soak
def test_200_requests_through_a_prefill_engine_that_dies_every_five_seconds(
    start: Start, tiny: str, tiny_fleet: Fleet
) -> None:
    f, dice = tiny_fleet, random.Random(11)
    prefill = Prefill(start, tiny)
    # Four megabytes per second: most kills hit a running pull.
    d = start("soak-decode", tiny, "kv_consumer", fault="throttle=4M", chunk_min=128 << 10).ready()
    free = d.state()["free"]
    sent: dict[str, list[int]] = {}
    leaving: list[tuple[float, str]] = []
    aborted: set[str] = set()
    remote = 0
    while len(sent) < REQUESTS or leaving:
        prefill.turn()
        while leaving and leaving[0][0] < time.monotonic():
            _, name = leaving.pop(0)
            d.send(op="abort", id=name)
            aborted.add(name)
        if len(sent) < REQUESTS:
            name = f"soak-{len(sent)}"
            tokens = sent[name] = f.prompt(dice.randrange(100, 1200))
            params = None
            if prefill.alive:
                try:
                    params = prefill.engine.prefill(name, tokens)
                    remote += 1
                except Dead:
                    pass
            d.add(name, tokens, params=params)
            if dice.random() < 0.1:
                leaving.append((time.monotonic() + dice.random() * 0.4, name))
                leaving.sort()
        time.sleep(0.15)
    wrong = []
    for name, tokens in sent.items():
        if name not in aborted and d.wait("done", name)["tokens"] != f.alone(tokens):
            wrong.append(name)
    assert not wrong
    assert d.settled()["free"] == free
    while not prefill.alive:
        prefill.turn()
        time.sleep(0.1)
    last = prefill.engine.settled()
    tokens = f.prompt(300)
    done = d.generate("last", tokens, params=prefill.engine.prefill("last", tokens))
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 1
    assert prefill.engine.settled()["free"] == last["free"] == free
    m = d.metrics()
    loads = {k: int(v) for k, v in m.items() if k.startswith("kvferry_loads{")}
    print(f"\n{REQUESTS} requests, {remote} prefilled remotely, {len(aborted)} aborted, {prefill.lives - 1} kills, {loads}")
    print(f"tokens: {m['kvferry_tokens_loaded']:.0f} loaded, {m['kvferry_tokens_recomputed']:.0f} recomputed")
    shares = {e.name: cpu_share(e) for e in (d, prefill.engine, f.mono)}
    print("idle: " + ", ".join(f"{name} {share:.2%} of a core" for name, share in shares.items()))
    assert max(shares.values()) < 0.05
