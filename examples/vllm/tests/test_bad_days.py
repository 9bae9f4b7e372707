"""Engines that die, clients that disconnect, offers that no engine fetches.

The decode engine's lanes are throttled here: a pull of a long prompt takes seconds, so a test can act in its middle.
"""

import time

import pytest
from conftest import Fleet, Start, transfer
from driver import LIMIT, Engine
from servers import free_port

BLOCK = 32
# Two megabytes a second: a block of the tiny model takes 60 ms, 1,900 tokens 4 s.
SLOW = {"fault": "throttle=2M", "chunk_min": 128 << 10, "deadline": 20}

PROGRESS = "[self.worker()._consumer.progress(n) for n in self.worker()._pulls]"


@pytest.fixture(scope="module")
def slow(start_shared: Start, tiny: str) -> Engine:
    return start_shared("slow-decode", tiny, "kv_consumer", **SLOW)


def loaded_part(d: Engine, part: float) -> float:
    """Waits until the engine's only pull has loaded this part of its chunks."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        for progress in d.python(PROGRESS):
            if progress and progress[1] and progress[0] / progress[1] >= part:
                return progress[0] / progress[1]
        time.sleep(0.01)
    raise AssertionError(f"no pull has loaded {part:.0%} of its chunks\n{d.tail()}")


def delta(d: Engine, before: dict[str, float], name: str) -> float:
    return d.metrics().get(name, 0) - before.get(name, 0)


def test_kill_9_in_the_middle_of_a_pull_keeps_the_loaded_blocks(start: Start, slow: Engine, tiny_fleet: Fleet, tiny: str) -> None:
    port = free_port()
    p = start("dies", tiny, "kv_producer", port=port).ready()
    slow.ready()
    free = slow.settled()["free"]
    tokens = tiny_fleet.prompt(1500)
    before = slow.metrics()
    params = p.prefill("dies", tokens)
    slow.add("dies", tokens, params=params)
    part = loaded_part(slow, 0.6)
    p.kill()
    killed = time.monotonic()
    done = slow.wait("done", "dies")
    took = time.monotonic() - killed
    print(f"answered {took:.3f} s after the kill at {part:.0%}")
    assert done["tokens"] == tiny_fleet.alone(tokens)
    kept = delta(slow, before, "kvferry_tokens_salvaged")
    missing = delta(slow, before, "kvferry_tokens_recomputed")
    assert kept + missing == len(tokens)
    # Chunks in flight at the kill are lost: about four of 47.
    assert kept >= (part - 0.1) * len(tokens)
    assert missing <= done["computed"] <= missing + BLOCK
    assert delta(slow, before, "kvferry_loads{result=partial}") == 1
    assert took < SLOW["deadline"] / 2, "the end of the connection ends the pull, not the deadline"
    assert slow.settled()["free"] == free

    # The old params again: first without a prefill engine, then with a new engine at its address.
    again = slow.generate("dies-again", tokens, params=params, salt="again")
    assert again["computed"] == len(tokens) and again["tokens"] == done["tokens"]
    p = start("reborn", tiny, "kv_producer", port=port).ready()
    tokens = tiny_fleet.prompt(200)
    # The decode engine remembers the offer as used and would not ask for it: give it another id.
    stale = {**params, "kvferry": {"offer": {**params["kvferry"]["offer"], "id": f"{7:032x}"}}}
    old = slow.generate("dies-old", tokens, params=stale)
    assert old["tokens"] == tiny_fleet.alone(tokens) and old["computed"] == len(tokens)
    # The next request loads from the new prefill engine.
    done = slow.generate("reborn", tokens, params=p.prefill("reborn", tokens), salt="reborn")
    assert done["tokens"] == tiny_fleet.alone(tokens) and done["computed"] == 1
    assert slow.settled()["free"] == free
    p.settled()


def test_a_load_decides_by_its_deadline(start: Start, tiny_fleet: Fleet, tiny: str) -> None:
    d = start("deadline", tiny, "kv_consumer", **{**SLOW, "deadline": 2}).ready()
    tokens = tiny_fleet.prompt(1900)
    before = d.metrics()
    done = d.generate("deadline", tokens, params=tiny_fleet.p.prefill("deadline", tokens))
    assert done["tokens"] == tiny_fleet.alone(tokens)
    missing = delta(d, before, "kvferry_tokens_recomputed")
    assert 0 < missing < len(tokens), "about half of it arrived in time"
    assert missing <= done["computed"] <= missing + BLOCK
    assert delta(d, before, "kvferry_blocks_invalid{cause=deadline}") > 0
    d.settled()
    tiny_fleet.settled()


@pytest.mark.parametrize("stage", ["before its admission", "before its load", "during its load", "during its decode"])
def test_an_aborted_request_costs_no_block(slow: Engine, tiny_fleet: Fleet, stage: str) -> None:
    f = tiny_fleet
    slow.ready()
    free = slow.settled()["free"]
    before = slow.metrics()
    tokens = f.prompt(800)
    params = f.p.prefill(stage, tokens)
    slow.add(stage, tokens, params=params, max_tokens=400)
    if stage == "during its load":
        loaded_part(slow, 0.3)
    elif stage == "during its decode":
        until = time.monotonic() + LIMIT
        while not slow.python("[r for r in self.scheduler.running if r.num_output_tokens > 3] != []"):
            assert time.monotonic() < until
    elif stage == "before its load":
        # One step lies between the admission and the load.
        slow.python("self.step()")
    slow.send(op="abort", id=stage)
    slow.wait("aborted", stage)
    # The next request may get its blocks.
    other = f.prompt(300)
    done = slow.generate(f"after {stage}", other, params=f.p.prefill(f"after {stage}", other))
    assert done["tokens"] == f.alone(other)
    assert slow.settled()["free"] == free
    assert delta(slow, before, "kvferry_tokens_recomputed") == 0, "an aborted load has no invalid blocks"
    f.settled()


def test_an_aborted_prefill_offers_nothing(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    offers = f.p.metrics().get("kvferry_offers_ended{why=released}", 0)
    f.p.add("p-abort", f.prompt(1900), max_tokens=400, params={"do_remote_decode": True})
    f.p.send(op="abort", id="p-abort")
    f.p.wait("aborted", "p-abort")
    f.settled()
    assert f.p.metrics().get("kvferry_offers_ended{why=released}", 0) == offers


def test_an_offer_without_a_decode_ends_with_its_lease(start: Start, tiny_fleet: Fleet, tiny: str) -> None:
    p = start("waits", tiny, "kv_producer", unclaimed_lease=1.5).ready()
    free = p.state()["free"]
    tokens = tiny_fleet.prompt(300)
    params = p.prefill("waits", tokens)
    assert p.state()["free"] == free - 10
    assert p.settled()["free"] == free
    assert p.metrics()["kvferry_offers_ended{why=expired}"] == 1
    # A late decode engine learns this at once, and prefills.
    done = tiny_fleet.d.generate("late", tokens, params=params)
    assert done["tokens"] == tiny_fleet.alone(tokens) and done["computed"] == 300
    assert tiny_fleet.d.metrics()["kvferry_blocks_invalid{cause=expired}"] >= 10


def test_a_claim_before_the_prefill_worker_knows_the_offer_waits_for_it(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    tokens = f.prompt(300)
    # The worker receives the offer later, as after a long step.
    hold = "[setattr(w, 'late', []) or setattr(w, 'offer', w.late.append) for w in [self.worker().offers]]"
    deliver = "[delattr(w, 'offer') or [w.offer(o) for o in w.late] for w in [self.worker().offers]]"
    f.p.python(f"[0 for _ in {hold}]")
    params = f.p.prefill("early", tokens)
    f.d.add("early", tokens, params=params)
    until = time.monotonic() + LIMIT
    while f.d.state()["waiting"] != ["WAITING_FOR_REMOTE_KVS"]:
        assert time.monotonic() < until
    # The prefill engine may have answered by now; no block is loaded.
    assert [p[0] for p in f.d.python(PROGRESS)] == [0]
    f.p.python(f"[0 for _ in {deliver}]")
    done = f.d.wait("done", "early")
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 1
    f.settled()


def test_a_decode_engine_that_dies_is_replaced(start: Start, tiny_fleet: Fleet, tiny: str) -> None:
    """A router retries on another decode engine; a new decode engine replaces the dead one."""
    f = tiny_fleet
    first = start("decode-dies", tiny, "kv_consumer", **SLOW).ready()
    tokens = f.prompt(1200)
    params = f.p.prefill("retry", tokens)
    first.add("retry", tokens, params=params)
    loaded_part(first, 0.3)
    first.kill()
    done = f.d.generate("retry", tokens, params=params)
    assert done["tokens"] == f.alone(tokens)
    # The dead engine's claim had not expired, so the offer was still live.
    assert done["computed"] == 1
    f.settled()
    second = start("decode-again", tiny, "kv_consumer").ready()
    tokens = f.prompt(300)
    done = second.generate("again", tokens, params=f.p.prefill("again", tokens))
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 1
    f.settled()


def test_policy_fail_fails_incomplete_loads_only(start: Start, tiny_fleet: Fleet, tiny: str) -> None:
    f = tiny_fleet
    d = start("strict", tiny, transfer=transfer("kv_consumer", policy="fail"), role="kv_consumer").ready()
    free = d.state()["free"]
    for name, lost in (("partial", 3), ("first", 0)):
        tokens = f.prompt(300)
        params = f.p.prefill(name, tokens, lost=[[0, lost]])
        assert d.generate(name, tokens, params=params)["reason"] == "error"
    tokens = f.prompt(300)
    params = f.p.prefill("total", tokens)
    params["kvferry"]["offer"]["ranks"][0]["addr"] = "127.0.0.1:9"
    assert d.generate("total", tokens, params=params)["reason"] == "error"
    f.p.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]")
    # Unusable params are not a failed load: the prompt is prefilled.
    done = d.generate("foreign", tokens, params={"do_remote_prefill": True})
    assert done["tokens"] == f.alone(tokens)
    tokens = f.prompt(300)
    done = d.generate("good", tokens, params=f.p.prefill("good", tokens))
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 1
    assert d.settled()["free"] == free
    f.settled()
