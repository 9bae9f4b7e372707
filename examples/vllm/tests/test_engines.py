"""Engines of other shapes: several cache groups, several ranks, a wrapper around the connector, a broken connector."""

import time
from typing import Any

import pytest
from conftest import Fleet, Start, prompt, transfer
from driver import LIMIT


def test_several_cache_groups_load_completely_or_not_at_all(start: Start, tiny_window: str) -> None:
    p = start("window-prefill", tiny_window, "kv_producer")
    d = start("window-decode", tiny_window, "kv_consumer")
    mono = start("window-mono", tiny_window)
    for e in (p, d, mono):
        e.ready()
    assert d.python("len(self.scheduler.kv_cache_config.kv_cache_groups)") == 2
    free = p.state()["free"], d.state()["free"]
    for length in (40, 128, 700):
        tokens = prompt(length, length)
        done = d.generate(f"good-{length}", tokens, params=p.prefill(f"good-{length}", tokens))
        assert done["tokens"] == mono.generate(f"good-{length}", tokens)["tokens"]
        assert done["computed"] == 1
    # Most blocks of the sliding window group are outside the window and are not loaded. Full attention: 22 blocks for 700
    # tokens.
    blocks = d.metrics()["kvferry_blocks_loaded"]
    assert blocks < 2 * (2 + 4 + 22)
    # If a window begins at the end of a block, the engine would free a block that holds the first key of the last token's
    # window. Computing that token without the block would be wrong, even if the text does not always show it.
    for length in (159, 703):
        tokens = prompt(length, length)
        done = d.generate(f"edge-{length}", tokens, params=p.prefill(f"edge-{length}", tokens))
        assert done["tokens"] == mono.generate(f"edge-{length}", tokens)["tokens"]
        assert done["computed"] == 1
    failed = d.metrics().get("kvferry_loads{result=failed}", 0)
    recomputed = d.metrics()["kvferry_tokens_recomputed"]
    assert failed == 0
    for group, lost in ((0, 21), (1, 21)):
        tokens = prompt(900 + group, 700)
        params = p.prefill(f"lost-{group}", tokens, lost=[[group, lost]])
        done = d.generate(f"lost-{group}", tokens, params=params)
        assert done["tokens"] == mono.generate(f"lost-{group}", tokens)["tokens"]
        assert done["computed"] == 700
    assert d.metrics()["kvferry_loads{result=failed}"] == failed + 2
    # The last token is always computed here.
    assert d.metrics()["kvferry_tokens_recomputed"] == recomputed + 2 * 699
    # Cached blocks are used, in both groups.
    prefix = prompt(77, 256)
    d.generate("warm", prefix + prompt(78, 9), max_tokens=1)
    tokens = prefix + prompt(79, 200)
    done = d.generate("hit", tokens, params=p.prefill("hit", tokens))
    assert done["tokens"] == mono.generate("hit", tokens)["tokens"]
    assert done["computed"] == 1
    assert (p.settled()["free"], d.settled()["free"]) == free


@pytest.mark.parametrize(("prefill", "decode"), [(2, 2), (2, 1), (1, 2)])
def test_tensor_parallel_ranks_pull_their_heads(
    start: Start, tiny: str, tiny_fleet: Fleet, prefill: int, decode: int
) -> None:
    f = tiny_fleet
    # Many processes on few cores: this test checks no promise in seconds.
    slow = {"deadline": LIMIT, "unclaimed_lease": LIMIT, "early_grace": 5, "patience": LIMIT}
    label = f"tp{prefill}{decode}"
    p = start(f"{label}-prefill", tiny, "kv_producer", llm={"tensor_parallel_size": prefill}, **slow)
    d = start(f"{label}-decode", tiny, "kv_consumer", llm={"tensor_parallel_size": decode}, **slow)
    for e in (p, d):
        e.ready()
    free = p.state()["free"], d.state()["free"]
    for length in (33, 700):
        tokens = f.prompt(length)
        params = p.prefill(f"good-{length}", tokens)
        assert len(params["kvferry"]["offer"]["ranks"]) == prefill
        done = d.generate(f"good-{length}", tokens, params=params)
        # Sums over ranks have another order than in one engine, so only the first tokens must be equal.
        assert done["tokens"][:4] == f.alone(tokens)[:4]
        assert done["computed"] == 1
    tokens = f.prompt(700)
    alone = f.alone(tokens)
    params = p.prefill("lost", tokens, lost=[[0, 7]])
    done = d.generate("lost", tokens, params=params)
    assert done["tokens"][:4] == alone[:4]
    assert done["computed"] == 700 - 7 * 32
    # An aborted load is reported by each rank, once.
    params = p.prefill("abort", tokens)
    d.add("abort", tokens, params=params, salt="abort")
    d.send(op="abort", id="abort")
    d.wait("aborted", "abort")
    # One rank has another incarnation: the whole engine counts as restarted.
    params["kvferry"]["offer"]["ranks"][-1]["incarnation"] = "00000000000000ab"
    params["kvferry"]["offer"]["id"] = f"{9:032x}"
    done = d.generate("half", tokens, params=params, salt="half")
    assert done["tokens"][:4] == alone[:4]
    assert done["computed"] == 700
    assert (p.settled()["free"], d.settled()["free"]) == free


def test_under_a_multi_connector(
    start: Start, tiny: str, tiny_fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def multi(role: str) -> dict[str, Any]:
        ours = {k: v for k, v in transfer(role).items() if k != "kv_load_failure_policy"}
        other = {
            "kv_connector": "ExampleConnector",
            "kv_role": role,
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path_factory.mktemp("other"))},
        }
        return {
            "kv_connector": "MultiConnector",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": [ours, other]},
        }

    f = tiny_fleet
    one_group = {"disable_hybrid_kv_cache_manager": True}
    p = start("multi-prefill", tiny, "kv_producer", transfer=multi("kv_producer"), llm=one_group)
    d = start("multi-decode", tiny, "kv_consumer", transfer=multi("kv_consumer"), llm=one_group)
    for e in (p, d):
        e.ready()
    free = p.state()["free"], d.state()["free"]
    tokens = f.prompt(300)
    done = d.generate("good", tokens, params=p.prefill("good", tokens))
    assert done["tokens"] == f.alone(tokens)
    assert done["computed"] == 1
    tokens = f.prompt(300)
    params = p.prefill("lost", tokens, lost=[[0, 4]])
    done = d.generate("lost", tokens, params=params)
    assert done["tokens"] == f.alone(tokens)
    assert done["computed"] == 300 - 4 * 32
    assert (p.settled()["free"], d.settled()["free"]) == free


def test_no_failure_of_the_connector_reaches_the_engine(start: Start, tiny: str, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    d = start("broken", tiny, "kv_both").ready()
    free = d.state()["free"]
    # Each method of the worker's side fails in turn.
    for method in ("start", "collect", "invalid_blocks"):
        tokens = f.prompt(200)
        d.python(f"setattr(self.worker(), '{method}', None)")
        done = d.generate(f"without {method}", tokens)
        assert done["tokens"] == f.alone(tokens)
        d.python(f"delattr(self.worker(), '{method}')")
    for method in ("matched", "allocated", "output", "finished", "meta", "pending", "ranks"):
        tokens = f.prompt(200)
        params = f.p.prefill(f"p without {method}", tokens)
        d.python(f"setattr(self.connector._side, '{method}', None)")
        if method == "meta":
            # A load that the workers never receive would wait indefinitely; nothing in this method can fail.
            params = {}
        done = d.generate(f"without {method}", tokens, params=params)
        assert done["tokens"] == f.alone(tokens), method
        d.python(f"delattr(self.connector._side, '{method}')")
        f.p.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]")
    # Choosing the blocks of a load fails: the worker reports a failed load, and the prompt is prefilled here.
    tokens = f.prompt(200)
    d.python("setattr(self.connector._side, '_wanted', None)")
    done = d.generate("no plan", tokens, params=f.p.prefill("no plan", tokens))
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 200
    d.python("delattr(self.connector._side, '_wanted')")
    f.p.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]")
    # The native part is closed.
    assert d.python("self.worker()._consumer.close(1.0)") is True
    assert d.python("self.worker()._producer.close(1.0)") is True
    tokens = f.prompt(200)
    done = d.generate("no consumer", tokens, params=f.p.prefill("no consumer", tokens))
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 200
    done = d.generate("no producer", tokens, params={"do_remote_decode": True}, max_tokens=1)
    # The scheduler side made an offer, but the worker cannot enter it and frees the blocks at once.
    assert d.settled()["free"] == free
    assert d.python("self.connector.shutdown()") is None
    f.p.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]")
    f.settled()


def test_sleep_stops_all_access_to_memory_and_waking_resumes(start: Start, tiny: str, tiny_fleet: Fleet) -> None:
    """vLLM's sleep mode needs a GPU; this test makes the same three calls."""
    f = tiny_fleet
    e = start("sleeps", tiny, "kv_both", fault="throttle=2M", chunk_min=128 << 10).ready()
    free = e.state()["free"]
    connector = "type(self.connector)"
    assert e.python(f"{connector}.supports_sleep_mode(None)") is True
    held = f.prompt(300)
    e.prefill("held", held)
    assert e.state()["free"] < free
    tokens = f.prompt(1500)
    e.add("pulling", tokens, params=f.p.prefill("pulling", tokens))
    until = time.monotonic() + 60
    while not e.python("[n for n in self.worker()._pulls if (self.worker()._consumer.progress(n) or (0, 0))[0] > 3]"):
        assert time.monotonic() < until
    group = "__import__('vllm.distributed.kv_transfer', fromlist=['x']).get_kv_transfer_group()"
    for _ in range(2):
        e.python(f"{group}.unregister_kv_caches()")
    assert e.python("self.worker()._consumer.pulls()") == 0
    assert e.python("self.worker()._producer.live()[0]") == 0
    for _ in range(2):
        e.python(f"{group}.restore_kv_caches()")
    done = e.wait("done", "pulling")
    assert done["tokens"] == f.alone(tokens)
    assert 1 < done["computed"] < 1500
    done = e.generate("awake", held, params=f.p.prefill("awake", held), salt="awake")
    assert done["tokens"] == f.alone(held) and done["computed"] == 1
    assert e.settled()["free"] == free
    f.settled()


def test_shutdown_returns_within_a_second(start: Start, tiny: str, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    e = start("ends", tiny, "kv_both", fault="throttle=1M").ready()
    tokens = f.prompt(1500)
    e.prefill("held", f.prompt(300))
    e.add("pulling", tokens, params=f.p.prefill("pulling", tokens))
    while not e.python("[n for n in self.worker()._pulls]"):
        pass
    group = "__import__('vllm.distributed.kv_transfer', fromlist=['x']).get_kv_transfer_group()"
    took = e.python(f"(lambda t: [{group}.shutdown(), time.monotonic() - t][1])(time.monotonic())")
    assert took < 1.0
    took = e.python(f"(lambda t: [{group}.shutdown(), time.monotonic() - t][1])(time.monotonic())")
    assert took < 0.1, "the second call does nothing"
    e.close()
    f.settled()
