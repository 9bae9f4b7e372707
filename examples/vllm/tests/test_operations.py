"""The operator's view: errors at the start, queues, refusals, log lines, wedges, and prefill engines that stand still."""

import os
import signal
import socket
import time
from collections.abc import Callable

import pytest
from conftest import Fleet, Start, prompt
from driver import LIMIT, Dead, Engine
from kvferry.vllm.repeats import EVERY, Repeats

REVOKE = "[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]"


def until(what: str, is_so: Callable[[], bool], engine: Engine) -> None:
    end = time.monotonic() + LIMIT
    while not is_so():
        assert time.monotonic() < end, f"not {what}\n{engine.tail()}"
        time.sleep(0.02)


# ---- the start --------------------------------------------------------------------------------------------------------


def test_an_error_at_the_start_stops_the_engine_with_a_line_that_says_what_to_do(start: Start, tiny: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        p = start("taken-port", tiny, "kv_producer", port=taken.getsockname()[1])
        with pytest.raises(Dead):
            p.ready()
        log = p.log.read_text()
        assert "ERROR" in log and "kvferry cannot start: " in log and "set on_start_failure to off" in log


@pytest.mark.parametrize("wrong", ["port", "tls", "lanes", "seal", "wildcard"])
def test_with_on_start_failure_off_the_engine_runs_and_the_gauge_says_that_kvferry_does_not(
    start: Start, tiny: str, tiny_fleet: Fleet, wrong: str
) -> None:
    f = tiny_fleet
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        more = {
            "port": {"port": taken.getsockname()[1]},
            "tls": {name: "/nonexistent.pem" for name in ("tls_cert", "tls_key", "tls_ca")},
            "lanes": {"lanes": "pigeon"},
            "seal": {"seal_keys": ["/nonexistent"]},
            "wildcard": {"host": "0.0.0.0"},
        }[wrong]
        p = start(f"off-{wrong}", tiny, "kv_both", on_start_failure="off", **more).ready()
    tokens = f.prompt(100)
    assert p.generate("off", tokens, params={"do_remote_decode": True})["tokens"] == f.alone(tokens)
    assert p.metrics()["kvferry_up{reason=start_failed}"] == 0
    assert "kvferry is off on this engine, which prefills every prompt itself: " in p.log.read_text()


def test_a_rank_that_listens_on_every_address_names_the_one_that_it_is_told(
    start: Start, tiny: str, tiny_fleet: Fleet
) -> None:
    f = tiny_fleet
    p = start("everywhere", tiny, "kv_producer", host="0.0.0.0", advertise="127.0.0.1").ready()
    tokens = f.prompt(100)
    params = p.prefill("everywhere", tokens)
    assert params["remote_host"] == "127.0.0.1" and params["remote_port"] > 0
    assert f.d.generate("everywhere", tokens, params=params)["computed"] == 1
    p.settled()


def test_the_start_is_one_line_and_the_gauge_is_set(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    f.settled()
    for engine in (f.p, f.d):
        until("up", lambda: engine.metrics().get("kvferry_up{reason=}") == 1, engine)
        (line,) = [x for x in engine.log.read_text().splitlines() if "kvferry: rank 0 is up: " in x]
        assert all(part in line for part in ("lanes ", "memory: host memory", "weights: ")), line
    assert "offers at 127.0.0.1:" in f.p.log.read_text()


# ---- queues -----------------------------------------------------------------------------------------------------------


def test_prefills_outlive_a_queue_that_is_longer_than_their_lease(start: Start, tiny: str, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    lease = 1.5
    p = start("queue-prefill", tiny, "kv_producer", unclaimed_lease=lease, claim_lease=4).ready()
    d = start("queue-decode", tiny, "kv_consumer", llm={"max_num_seqs": 1}).ready()
    free = p.state()["free"]
    d.add("first", f.prompt(40), max_tokens=1900)
    until("running", lambda: d.python("len(self.scheduler.running)") == 1, d)
    prompts = [f.prompt(200) for _ in range(6)]
    params = []
    for i, tokens in enumerate(prompts):
        params.append(p.prefill(f"queued-{i}", tokens))
        d.add(f"queued-{i}", tokens, params=params[i])
    queued = time.monotonic()
    until("claimed", lambda: p.python("self.worker()._producer.live()")[1] == 6, p)
    # There is no event to wait for: nothing must happen.
    while time.monotonic() < queued + 4 * lease:
        assert p.python("self.worker()._producer.live()")[0] == 6, "an offer was lost in the queue"
        time.sleep(0.1)
    d.send(op="abort", id="first")
    for i, tokens in enumerate(prompts):
        done = d.wait("done", f"queued-{i}")
        assert done["tokens"] == f.alone(tokens) and done["computed"] == 1
    assert p.settled()["free"] == free
    d.settled()


def test_a_request_aborted_in_the_queue_frees_its_offer(start: Start, tiny: str, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    d = start("abort-in-queue", tiny, "kv_consumer", llm={"max_num_seqs": 1}).ready()
    d.add("first", f.prompt(40), max_tokens=1500)
    until("running", lambda: d.python("len(self.scheduler.running)") == 1, d)
    tokens = f.prompt(200)
    d.add("queued", tokens, params=f.p.prefill("abort-in-queue", tokens))
    until("claimed", lambda: f.p.python("self.worker()._producer.live()")[1] == 1, f.p)
    d.send(op="abort", id="queued")
    d.wait("aborted", "queued")
    f.p.settled()
    d.send(op="abort", id="first")
    d.wait("aborted", "first")
    d.settled()


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_what_the_decode_side_refuses_is_released_and_said_once(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    said = f.d.log.read_text().count("is prefilled here: its offer belongs to another prompt")
    released = f.p.metrics().get("kvferry_offers_ended{why=released}", 0)
    refused = f.d.metrics().get("kvferry_mismatches{part=prompt}", 0)
    for i in range(5):
        params = f.p.prefill(f"wrong-{i}", f.prompt(100))
        tokens = f.prompt(100)
        assert f.d.generate(f"wrong-{i}", tokens, params=params)["tokens"] == f.alone(tokens)
    # No lease has to run out.
    f.settled()
    assert f.p.metrics()["kvferry_offers_ended{why=released}"] - released == 5
    assert f.d.metrics()["kvferry_mismatches{part=prompt}"] - refused == 5
    assert f.d.log.read_text().count("is prefilled here: its offer belongs to another prompt") - said <= 1


def test_lines_of_one_kind_come_once_a_minute_with_a_count() -> None:
    now, said = [0.0], []
    repeats = Repeats(lambda: now[0])
    for _ in range(4):
        repeats.log(said.append, "a", "line")
    repeats.log(said.append, "b", "other")
    assert said == ["line", "other"]
    now[0] = EVERY
    repeats.log(said.append, "a", "line")
    assert said[2:] == ["line (3 more like this since the last such line)"]


# ---- peers that stand still -------------------------------------------------------------------------------------------


def test_a_stopped_prefill_engine_delays_a_request_by_the_patience_and_not_by_the_deadline(
    start: Start, tiny: str, tiny_fleet: Fleet
) -> None:
    f = tiny_fleet
    p = start("stands-still", tiny, "kv_producer").ready()
    d = start("impatient", tiny, "kv_consumer").ready()
    warm = f.prompt(100)
    assert d.generate("warm", warm, params=p.prefill("warm", warm))["computed"] == 1
    tokens = f.prompt(300)
    params = p.prefill("stopped", tokens)
    os.kill(p._pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        done = d.generate("stopped", tokens, params=params)
        took = time.monotonic() - began
    finally:
        os.kill(p._pid, signal.SIGCONT)
    assert done["tokens"] == f.alone(tokens)
    # 3 s are promised, 30 s is the deadline.
    assert took < 10, f"answered after {took:.1f} s"
    d.settled()


def test_forty_requests_that_name_a_silent_port_hold_memory_for_seconds_only(
    start: Start, tiny: str, tiny_fleet: Fleet
) -> None:
    f = tiny_fleet
    d = start("silent-port", tiny, "kv_consumer").ready()
    free = d.state()["free"]
    params, prompts = [], [f.prompt(100) for _ in range(40)]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        for i, tokens in enumerate(prompts):
            params.append(f.p.prefill(f"silent-{i}", tokens))
            params[i]["kvferry"]["offer"]["ranks"][0]["addr"] = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        for i, tokens in enumerate(prompts):
            d.add(f"silent-{i}", tokens, params=params[i], max_tokens=1)
        until("free", lambda: d.python("len(self.worker()._pulls)") == 0 and d.state()["requests"] == 0, d)
        took = time.monotonic() - began
    for i in range(40):
        d.wait("done", f"silent-{i}")
    assert took < 20, f"they held memory for {took:.1f} s, where the deadline is 30 s"
    assert d.settled()["free"] == free
    f.p.python(REVOKE)
    f.settled()


# ---- a wedge ----------------------------------------------------------------------------------------------------------


def test_after_a_wedge_its_request_ends_and_no_other_one_hangs(start: Start, tiny: str, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    d = start("wedges", tiny, "kv_consumer", lanes="tcp", fault="wedge", deadline=1).ready()
    tokens = f.prompt(300)
    d.add("wedged", tokens, params=f.p.prefill("wedged", tokens))
    until("wedged", lambda: d.python("self.worker()._consumer.wedged()") == 1, d)
    until("ended", lambda: d.python("self.scheduler.get_num_unfinished_requests()") == 0, d)
    # The same peer, and no pull: the prompt is prefilled here.
    tokens = f.prompt(300)
    done = d.generate("next", tokens, params=f.p.prefill("next", tokens))
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 300
    assert d.metrics()["kvferry_up{reason=wedged}"] == 0
    assert "loads nothing any more (wedged)" in d.log.read_text()
    f.p.settled()


# ---- sliding windows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [158, 159, 160, 191, 703])
def test_prompts_of_every_alignment_load_with_a_sliding_window(window_pair: tuple[Engine, ...], length: int) -> None:
    p, d, mono = window_pair
    tokens = prompt(10_000 + length, length)
    loads = d.metrics().get("kvferry_loads{result=loaded}", 0)
    done = d.generate(f"aligned-{length}", tokens, params=p.prefill(f"aligned-{length}", tokens))
    assert done["tokens"] == mono.generate(f"aligned-{length}", tokens)["tokens"]
    assert done["computed"] == 1 and d.metrics()["kvferry_loads{result=loaded}"] == loads + 1
    p.settled()
    d.settled()


@pytest.fixture(scope="module")
def window_pair(start_shared: Start, tiny_window: str) -> tuple[Engine, ...]:
    pair = (
        start_shared("aligned-prefill", tiny_window, "kv_producer"),
        start_shared("aligned-decode", tiny_window, "kv_consumer"),
        start_shared("aligned-mono", tiny_window),
    )
    return tuple(engine.ready() for engine in pair)

