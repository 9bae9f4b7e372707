"""The decode engine's answer equals the answer of one engine alone, with and without failures."""

import copy

import pytest
from conftest import Fleet, Start
from driver import PREFILL

BLOCK = 32


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def fleet(request: pytest.FixtureRequest, start_shared: Start) -> Fleet:
    if request.param == "tiny":
        return request.getfixturevalue("tiny_fleet")
    # 46 KB per token in 30 layers: the cache has room for 5,000 tokens.
    return Fleet(start_shared, request.getfixturevalue("smollm2"), "smollm2", (100, 40_000), cache=256 << 20)


def disaggregated(fleet: Fleet, name: str, tokens: list[int], change=None, max_tokens: int = 16, lost=()):
    """Prefills on one engine and decodes on the other; `change` edits the name in between. The offer leaves out `lost`."""
    params = fleet.p.prefill(name, tokens, lost=list(lost))
    if change:
        change(params["kvferry"]["offer"])
    return fleet.d.generate(name, tokens, params=params, max_tokens=max_tokens)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 700])
def test_after_a_complete_load_only_the_last_token_is_computed(fleet: Fleet, length: int) -> None:
    tokens = fleet.prompt(length)
    done = disaggregated(fleet, f"good-{length}", tokens)
    assert done["tokens"] == fleet.alone(tokens)
    assert done["computed"] == 1
    fleet.settled()


@pytest.mark.parametrize(("missing", "length"), [(2, 300), (0, 300), (9, 300), (9, 319)])
def test_a_lost_block_costs_the_tail_only(fleet: Fleet, missing: int, length: int) -> None:
    tokens = fleet.prompt(length)
    before = fleet.d.metrics()
    done = disaggregated(fleet, f"lost-{missing}-{length}", tokens, lost=[[0, missing]])
    after = fleet.d.metrics()
    assert done["tokens"] == fleet.alone(tokens)
    assert done["computed"] == length - missing * BLOCK
    # kvferry's own metrics are true after a failure.
    counted = {k: after[k] - before.get(k, 0) for k in ("kvferry_tokens_salvaged", "kvferry_tokens_recomputed")}
    assert counted == {
        "kvferry_tokens_salvaged": missing * BLOCK,
        "kvferry_tokens_recomputed": length - missing * BLOCK,
    }
    causes = "kvferry_blocks_invalid{cause=not_offered}"
    assert after[causes] - before.get(causes, 0) == 1
    fleet.settled()


def test_after_a_total_failure_the_decode_engine_prefills(fleet: Fleet) -> None:
    def another_incarnation(offer) -> None:
        offer["ranks"][0]["incarnation"] = "00000000000000ab"

    def closed_port(offer) -> None:
        offer["ranks"][0]["addr"] = "127.0.0.1:9"

    for name, change in (("restarted", another_incarnation), ("gone", closed_port)):
        tokens = fleet.prompt(200)
        done = disaggregated(fleet, name, tokens, change)
        assert done["tokens"] == fleet.alone(tokens)
        assert done["computed"] == len(tokens)
        fleet.d.settled()
        # No engine fetched the offer: revoke it, instead of waiting for the end of its lease.
        fleet.p.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]")
        fleet.settled()


def test_several_requests_share_a_prefix(fleet: Fleet) -> None:
    prefix = fleet.prompt(160)
    prompts = [prefix + fleet.prompt(40 + i) for i in range(4)]
    params = [fleet.p.prefill(f"shared-{i}", t) for i, t in enumerate(prompts)]
    for i, (t, p) in enumerate(zip(prompts, params, strict=True)):
        fleet.d.add(f"shared-{i}", t, params=p)
    for i, t in enumerate(prompts):
        assert fleet.d.wait("done", f"shared-{i}")["tokens"] == fleet.alone(t)
    fleet.settled()


def test_each_load_of_a_shared_prefix_loses_another_block(fleet: Fleet) -> None:
    prefix = fleet.prompt(160)
    prompts = [prefix + fleet.prompt(40) for _ in range(4)]
    params = [fleet.p.prefill(f"sharedlost-{i}", t, lost=[[0, i]]) for i, t in enumerate(prompts)]
    for i, (t, p) in enumerate(zip(prompts, params, strict=True)):
        fleet.d.add(f"sharedlost-{i}", t, params=p)
    for i, t in enumerate(prompts):
        assert fleet.d.wait("done", f"sharedlost-{i}")["tokens"] == fleet.alone(t)
    fleet.settled()


def test_32_requests_at_once(fleet: Fleet) -> None:
    prompts = [fleet.prompt(20 + 7 * i) for i in range(32)]
    for i, t in enumerate(prompts):
        fleet.p.add(f"many-{i}", t, max_tokens=1, params=copy.deepcopy(PREFILL))
    for i, t in enumerate(prompts):
        fleet.d.add(f"many-{i}", t, params=fleet.p.wait("done", f"many-{i}")["params"])
    done = [fleet.d.wait("done", f"many-{i}") for i in range(32)]
    assert [d["tokens"] for d in done] == fleet.alone_at_once(prompts)
    assert [d["computed"] for d in done] == [1] * 32
    fleet.settled()
