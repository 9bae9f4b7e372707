"""Decode engines that load a prompt while it is still computed."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Fleet, Start
from driver import LIMIT, Engine
from kvferry.vllm.peers import FRESH
from servers import free_port

BLOCK = 32
# A step computes 128 tokens, so a prompt takes many.
CHUNK = 128
CHUNKED = {"max_num_batched_tokens": CHUNK, "enable_chunked_prefill": True}
NUMBERS = itertools.count()

# Tokens from the prompt's start that the only pull of an engine has loaded.
LOADED = "[self.worker()._consumer.loaded_prefix(n) for n in self.worker()._pulls]"
# Whether the answers of all endpoints are so old that they are asked for again.
STALE = f"all(time.monotonic() > e.answered + {FRESH} for e in self.connector._side._remotes.peers._entries.values())"


def prefill_params(transfer: str) -> dict[str, Any]:
    return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer}


def decode_params(transfer: str, bootstrap: int) -> dict[str, Any]:
    return {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": transfer,
        "remote_bootstrap_addr": f"http://127.0.0.1:{bootstrap}",
        "remote_engine_id": "some-engine",
    }


def transfer_id() -> str:
    return f"xfer-{next(NUMBERS):032x}"


class Pair:
    """A prefill engine with a bootstrap endpoint, and a decode engine."""

    def __init__(self, start: Start, model: str, label: str, p: dict[str, Any] | None = None, **d: Any) -> None:
        self.bootstrap = free_port()
        more: dict[str, Any] = {"llm": CHUNKED, "bootstrap_port": self.bootstrap} | (p or {})
        self.p = start(f"{label}-prefill", model, "kv_producer", **more)
        self.d = start(f"{label}-decode", model, "kv_consumer", **d)
        for e in (self.p, self.d):
            e.ready()
        self.free = (self.p.state()["free"], self.d.state()["free"])

    def send(self, name: str, tokens: list[int], *, pause: float = 0.0, **more: Any) -> None:
        """Sends a prompt to both engines, first to the decode engine: it must wait. With `pause`, the prefill engine stops
        after this part of the computation."""
        transfer = transfer_id()
        self.d.add(name, tokens, params=decode_params(transfer, self.bootstrap), **more)
        if pause:
            self.p.pause(name, int(pause * len(tokens)))
        self.p.add(name, tokens, params=prefill_params(transfer), max_tokens=1)

    def paused(self, name: str) -> int:
        """Waits until the prefill engine has stopped and the decode engine has loaded all that is computed. Returns the number
        of these tokens."""
        computed = self.p.wait("paused", name)["scheduled"]
        wait_until(lambda: (loaded(self.d) or [0])[0] >= computed // BLOCK * BLOCK)
        return computed

    def settled(self) -> None:
        assert (self.p.settled()["free"], self.d.settled()["free"]) == self.free


def loaded(d: Engine) -> list[int]:
    return [n or 0 for n in d.python(LOADED)]


def claims(d: Engine) -> int:
    """Claims that wait for the beginning of a prefill."""
    return d.python("len(self.worker()._holds)")


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture(scope="module")
def pair(start_shared: Start, tiny: str) -> Pair:
    return Pair(start_shared, tiny, "overlap")


def test_a_prompt_is_loaded_while_it_is_computed(pair: Pair, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    for length in (1, 20, 128, 129, 700, 1500):
        tokens = f.prompt(length)
        name = f"good-{length}"
        pair.send(name, tokens, pause=0.5 if length > 2 * CHUNK else 0)
        if length > 2 * CHUNK:
            assert pair.paused(name) < length
            pair.p.resume()
        done = pair.d.wait("done", name)
        assert done["tokens"] == f.alone(tokens)
        assert done["computed"] == 1
        # Routers that send one request after the other can use the same name.
        assert pair.p.wait("done", name)["params"]["remote_num_tokens"] == length
    pair.settled()


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_what_a_prefill_computed_before_it_died_stays_loaded(
    start: Start, tiny: str, tiny_fleet: Fleet, part: float
) -> None:
    pair = Pair(start, tiny, f"dies-{part}")
    tokens = tiny_fleet.prompt(1900)
    alone = tiny_fleet.alone(tokens)
    pair.send("dies", tokens, pause=part)
    computed = pair.paused("dies")
    pair.p.kill()
    done = pair.d.wait("done", "dies")
    assert done["tokens"] == alone
    assert computed >= part * len(tokens)
    assert done["computed"] == len(tokens) - computed // BLOCK * BLOCK
    assert pair.d.metrics()["kvferry_blocks_loaded"] >= (part - 0.1) * len(tokens) / BLOCK
    assert pair.d.settled()["free"] == pair.free[1]

    # Nobody answers now: the prompt is prefilled here, and one line says so.
    for i in range(2):
        tokens = tiny_fleet.prompt(100)
        pair.d.add(f"down-{i}", tokens, params=decode_params(transfer_id(), pair.bootstrap))
        done = pair.d.wait("done", f"down-{i}")
        assert done["tokens"] == tiny_fleet.alone(tokens) and done["computed"] == 100
    assert pair.d.log.read_text().count("no running prefill can be loaded") == 1
    # A new prefill engine at the same address is used as soon as its endpoint may be asked again.
    pair.p = start("reborn", tiny, "kv_producer", bootstrap_port=pair.bootstrap, llm=CHUNKED).ready()
    wait_until(lambda: pair.d.python(STALE))
    for i in range(2):
        tokens = tiny_fleet.prompt(300)
        pair.send(f"reborn-{i}", tokens)
        done = pair.d.wait("done", f"reborn-{i}")
        assert done["tokens"] == tiny_fleet.alone(tokens) and done["computed"] == 1
    pair.settled()


@pytest.mark.parametrize("when", ["before the prefill", "in the middle", "after the prefill"])
def test_an_aborted_decode_costs_no_block(pair: Pair, tiny_fleet: Fleet, when: str) -> None:
    f = tiny_fleet
    tokens = f.prompt(1000)
    transfer = transfer_id()
    pair.d.add(when, tokens, params=decode_params(transfer, pair.bootstrap), max_tokens=400)
    wait_until(lambda: claims(pair.d) == 1)
    # A request takes no blocks before its prefill has begun.
    assert pair.d.state()["free"] == pair.free[1]
    if when == "in the middle":
        pair.p.pause(when, 500)
    if when != "before the prefill":
        pair.p.add(when, tokens, params=prefill_params(transfer), max_tokens=1)
    if when == "in the middle":
        pair.paused(when)
    elif when == "after the prefill":
        wait_until(lambda: pair.d.python("[r for r in self.scheduler.running if r.num_output_tokens > 3] != []"))
    pair.d.send(op="abort", id=when)
    pair.d.wait("aborted", when)
    # Its blocks are free although no decode engine is left.
    pair.d.settled()
    pair.p.resume()
    if when == "before the prefill":
        pair.p.add(when, tokens, params=prefill_params(transfer), max_tokens=1)
    pair.p.wait("done", when)
    pair.settled()


def test_an_aborted_prefill_leaves_what_it_computed(pair: Pair, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    tokens = f.prompt(1500)
    pair.send("p-aborts", tokens, pause=0.5)
    computed = pair.paused("p-aborts")
    pair.p.send(op="abort", id="p-aborts")
    pair.p.wait("aborted", "p-aborts")
    pair.p.resume()
    done = pair.d.wait("done", "p-aborts")
    assert done["tokens"] == f.alone(tokens)
    assert done["computed"] == len(tokens) - computed // BLOCK * BLOCK
    pair.settled()
    # Before it has begun: nothing is loaded, and the decode engine does not wait for it.
    pair.p.pause("first", 128)
    pair.p.add("first", f.prompt(1000), max_tokens=1)
    pair.p.wait("paused", "first")
    tokens = f.prompt(300)
    pair.send("p-aborts-early", tokens)
    wait_until(lambda: claims(pair.d) == 1)
    pair.p.send(op="abort", id="p-aborts-early")
    pair.p.wait("aborted", "p-aborts-early")
    pair.p.resume()
    done = pair.d.wait("done", "p-aborts-early")
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 300
    pair.settled()


def test_a_preempted_prefill_leaves_what_it_computed(start: Start, tiny: str, tiny_fleet: Fleet) -> None:
    """The pool is too small for two requests: the earlier one needs a block in the middle of the second one's prefill, and gets
    one of those that the decode engine, which is slow, still reads."""
    f = tiny_fleet
    llm = {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "max_model_len": 1952}
    slow = {"fault": "throttle=4M", "chunk_min": 128 << 10}
    pair = Pair(start, tiny, "small", {"llm": llm, "cache": 63 << 17}, **slow)
    tokens, first = f.prompt(1900), f.prompt(40)
    alone, first_alone = f.alone(tokens), f.alone(first, max_tokens=200)
    pair.p.add("first", first, max_tokens=200)
    pair.send("preempted", tokens)
    done = pair.d.wait("done", "preempted")
    assert done["tokens"] == alone
    blocks = pair.d.metrics()["kvferry_blocks_loaded"]
    assert 0 < blocks < 50, "it was preempted before its end"
    assert len(tokens) - (blocks + 1) * BLOCK < done["computed"] <= len(tokens) - blocks * BLOCK
    # The fence may notice it first.
    causes = pair.d.metrics()
    assert sum(causes.get(f"kvferry_blocks_invalid{{cause={c}}}", 0) for c in ("revoked", "stale")) == 60 - blocks
    assert pair.p.wait("done", "first")["tokens"] == first_alone
    assert pair.p.wait("done", "preempted")["tokens"] == alone[:1]
    pair.settled()


def test_all_running_prefills_are_preempted_at_once(pair: Pair, tiny_fleet: Fleet) -> None:
    """A reset of the prefix cache preempts a request, which resumes within the same step."""
    f = tiny_fleet
    tokens = f.prompt(1500)
    pair.send("reset", tokens, pause=0.5)
    computed = pair.paused("reset")
    assert pair.p.python("self.scheduler.reset_prefix_cache(reset_running_requests=True)")
    pair.p.resume()
    done = pair.d.wait("done", "reset")
    assert done["tokens"] == f.alone(tokens)
    assert done["computed"] == len(tokens) - computed // BLOCK * BLOCK
    assert pair.p.wait("done", "reset")["tokens"] == done["tokens"][:1]
    pair.settled()


def test_a_prefill_that_does_not_go_on_is_given_up(start: Start, pair: Pair, tiny: str, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    d = start("impatient", tiny, "kv_consumer", queued=1, stalled=1).ready()
    free = d.state()["free"]
    tokens, transfer = f.prompt(1000), transfer_id()
    # It waits in the queue of an engine that makes no step.
    pair.p.pause("blocks", CHUNK)
    pair.p.add("blocks", f.prompt(300), max_tokens=1)
    pair.p.wait("paused", "blocks")
    pair.p.add("queued", tokens, params=prefill_params(transfer), max_tokens=1)
    d.add("queued", tokens, params=decode_params(transfer, pair.bootstrap))
    done = d.wait("done", "queued")
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 1000
    assert "its prefill has not begun within 1 s" in d.log.read_text()
    pair.p.resume()
    pair.p.wait("done", "queued")
    # It stops in the middle.
    tokens, transfer = f.prompt(1000), transfer_id()
    pair.p.pause("stalled", 500)
    pair.p.add("stalled", tokens, params=prefill_params(transfer), max_tokens=1)
    d.add("stalled", tokens, params=decode_params(transfer, pair.bootstrap))
    computed = pair.p.wait("paused", "stalled")["scheduled"]
    done = d.wait("done", "stalled")
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 1000 - computed // BLOCK * BLOCK
    assert d.metrics()["kvferry_blocks_invalid{cause=stalled}"] > 0
    pair.p.resume()
    pair.p.wait("done", "stalled")
    assert d.settled()["free"] == free
    pair.settled()


def test_a_prompt_that_is_not_offered_is_prefilled_by_an_engine_that_fails_lost_loads(
    start: Start, pair: Pair, tiny: str, tiny_fleet: Fleet
) -> None:
    f = tiny_fleet
    d = start("fails-loads", tiny, "kv_consumer", policy="fail").ready()
    free = d.state()["free"]
    pair.p.pause("stops", 128)
    pair.p.add("stops", f.prompt(1000), max_tokens=1)
    pair.p.wait("paused", "stops")
    tokens, transfer = f.prompt(300), transfer_id()
    d.add("not-offered", tokens, params=decode_params(transfer, pair.bootstrap))
    pair.p.add("not-offered", tokens, params=prefill_params(transfer), max_tokens=1)
    wait_until(lambda: claims(d) == 1)
    pair.p.send(op="abort", id="not-offered")
    pair.p.wait("aborted", "not-offered")
    pair.p.resume()
    done = d.wait("done", "not-offered")
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 300
    # It took no blocks for a load.
    assert sum(n for name, n in d.metrics().items() if name.startswith("kvferry_loads")) == 0
    assert d.settled()["free"] == free
    pair.settled()


@pytest.mark.parametrize("length", [1, 20, 129])
def test_a_prompt_with_nothing_to_load_does_not_wait_for_its_prefill(pair: Pair, tiny_fleet: Fleet, length: int) -> None:
    f = tiny_fleet
    tokens = f.prompt(length)
    if length > 1:
        # All blocks of it are cached, and the last token is always computed.
        pair.d.generate(f"warm-{length}", tokens + f.prompt(40), max_tokens=1)
        tokens = tokens[: length // BLOCK * BLOCK + 1]
    done = pair.d.generate(f"nothing-{length}", tokens, params=decode_params(transfer_id(), pair.bootstrap))
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 1
    pair.settled()


def test_requests_with_one_transfer_id_are_answered_and_one_of_them_is_loaded(pair: Pair, tiny_fleet: Fleet) -> None:
    """As with parallel sampling, where each answer is a request of its own."""
    f = tiny_fleet
    tokens, transfer = f.prompt(1000), transfer_id()
    for i in range(3):
        pair.d.add(f"d-sample-{i}", tokens, params=decode_params(transfer, pair.bootstrap))
    pair.p.pause("p-sample-0", 500)
    for i in range(3):
        pair.p.add(f"p-sample-{i}", tokens, params=prefill_params(transfer), max_tokens=1)
    pair.p.wait("paused", "p-sample-0")
    pair.p.send(op="abort", id="p-sample-1")
    pair.p.wait("aborted", "p-sample-1")
    pair.p.resume()
    done = [pair.d.wait("done", f"d-sample-{i}") for i in range(3)]
    assert [d["tokens"] for d in done] == [f.alone(tokens)] * 3
    # The others compute the prompt, or find it in the cache.
    assert min(d["computed"] for d in done) == 1
    for i in (0, 2):
        pair.p.wait("done", f"p-sample-{i}")
    pair.settled()


def test_engines_with_seal_keys_overlap(start: Start, tiny: str, tiny_fleet: Fleet, tmp_path: Path) -> None:
    f = tiny_fleet
    keys = [tmp_path / name for name in ("key", "other")]
    for i, key in enumerate(keys):
        key.write_text(f"{i}" * 64)
    sealed = {"llm": CHUNKED, "seal_keys": str(keys[0])}
    pair = Pair(start, tiny, "sealed", sealed, seal_keys=str(keys[0]))
    tokens = f.prompt(500)
    pair.send("sealed", tokens)
    done = pair.d.wait("done", "sealed")
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 1
    # An engine with another key does not believe the endpoint.
    other = start("another-key", tiny, "kv_consumer", seal_keys=str(keys[1])).ready()
    transfer = transfer_id()
    other.add("other", tokens, params=decode_params(transfer, pair.bootstrap))
    done = other.wait("done", "other")
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 500
    assert "its bootstrap answer is unusable" in other.log.read_text()
    pair.settled()


def test_two_decode_engines_load_one_prompt(start: Start, pair: Pair, tiny: str, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    other = start("second-decode", tiny, "kv_consumer").ready()
    free = other.state()["free"]
    tokens, transfer = f.prompt(1500), transfer_id()
    for d in (pair.d, other):
        d.add("both", tokens, params=decode_params(transfer, pair.bootstrap))
        wait_until(lambda d=d: claims(d) == 1)
    pair.p.pause("both", 700)
    pair.p.add("both", tokens, params=prefill_params(transfer), max_tokens=1)
    computed = pair.paused("both")
    wait_until(lambda: loaded(other) == [computed // BLOCK * BLOCK])
    pair.p.resume()
    alone = f.alone(tokens)
    for d in (pair.d, other):
        done = d.wait("done", "both")
        assert done["tokens"] == alone and done["computed"] == 1
    assert other.settled()["free"] == free
    pair.settled()


def test_many_requests_at_once(pair: Pair, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    prompts = [f.prompt(40 + 13 * i) for i in range(32)]
    for i, tokens in enumerate(prompts):
        pair.send(f"many-{i}", tokens)
    expected = f.alone_at_once(prompts)
    done = [pair.d.wait("done", f"many-{i}") for i in range(32)]
    assert [d["tokens"] for d in done] == expected
    # The rest are prompts whose last token alone was computed here.
    assert sum(d["computed"] for d in done) == 32
    pair.settled()


def test_cached_prefixes_on_both_sides(pair: Pair, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    prefix = f.prompt(640)
    # 20 blocks are cached at the prefill engine, 10 at the decode engine.
    pair.p.generate("warm-p", prefix + f.prompt(8), max_tokens=1)
    pair.d.generate("warm-d", prefix[:320] + f.prompt(8), max_tokens=1)
    tokens = prefix + f.prompt(360)
    before = pair.d.metrics()["kvferry_blocks_loaded"]
    pair.send("hit", tokens, pause=0.1)
    # The first step computes 128 tokens after the cached ones, which are loaded as well.
    assert pair.p.wait("paused", "hit")["scheduled"] == CHUNK
    wait_until(lambda: loaded(pair.d) == [640 + CHUNK])
    pair.p.resume()
    done = pair.d.wait("done", "hit")
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 1
    assert pair.d.metrics()["kvferry_blocks_loaded"] - before == 32 - 10
    # Two prompts with one prefix, computed in the same steps: the second one's hits are not computed when it begins.
    prefix = f.prompt(64)
    prompts = [prefix + f.prompt(30) for _ in range(2)]
    for i, tokens in enumerate(prompts):
        pair.send(f"shared-{i}", tokens)
    for i, tokens in enumerate(prompts):
        done = pair.d.wait("done", f"shared-{i}")
        assert done["tokens"] == f.alone(tokens)
    pair.settled()


def test_windows_are_loaded_at_the_end(start: Start, tiny_window: str) -> None:
    pair = Pair(start, tiny_window, "window")
    mono = start("window-mono", tiny_window).ready()
    from conftest import prompt

    for length in (40, 159, 703, 1500):
        tokens = prompt(length, length)
        name = f"window-{length}"
        pair.send(name, tokens)
        done = pair.d.wait("done", name)
        assert done["tokens"] == mono.generate(name, tokens)["tokens"]
        assert done["computed"] == 1
    pair.settled()


def test_a_prefill_engine_that_goes_on_with_its_answer_keeps_the_windows_of_its_offer(start: Start, tiny_window: str) -> None:
    """The engine frees blocks that its own window has left, in each step. Other requests then use them."""
    from conftest import prompt

    pair = Pair(start, tiny_window, "long-window", {"llm": CHUNKED, "cache": 16 << 20})
    mono = start("long-window-mono", tiny_window).ready()
    tokens, transfer = prompt(71, 700), transfer_id()
    pair.p.pause("long", len(tokens) + 200)
    pair.p.add("long", tokens, params=prefill_params(transfer), max_tokens=300)
    pair.p.wait("paused", "long")
    pair.p.resume()
    pair.p.wait("done", "long")
    for i in range(4):
        pair.p.generate(f"reuses-{i}", prompt(72 + i, 1500), max_tokens=1)
    pair.d.add("late", tokens, params=decode_params(transfer, pair.bootstrap))
    done = pair.d.wait("done", "late")
    assert done["tokens"] == mono.generate("late", tokens)["tokens"]
    assert done["computed"] == 1
    pair.settled()


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2)])
def test_ranks_of_another_number(start: Start, tiny: str, tiny_fleet: Fleet, prefill: int, decode: int) -> None:
    f = tiny_fleet
    slow = {"deadline": LIMIT, "patience": LIMIT, "stalled": LIMIT}
    there = {"llm": CHUNKED | {"tensor_parallel_size": prefill}, **slow}
    pair = Pair(start, tiny, f"ranks{prefill}{decode}", there, llm={"tensor_parallel_size": decode}, **slow)
    tokens = f.prompt(700)
    pair.send("ranks", tokens)
    done = pair.d.wait("done", "ranks")
    # Sums over ranks have another order than in one engine, so only the first tokens must be equal.
    assert done["tokens"][:4] == f.alone(tokens)[:4] and done["computed"] == 1
    pair.settled()
