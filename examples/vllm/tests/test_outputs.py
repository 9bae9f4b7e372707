"""What a decode engine answers is what one engine alone would answer, on good days and on bad ones."""

import copy

import pytest
from conftest import Fleet, Start
from driver import PREFILL

BLOCK = 32


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def fleet(request: pytest.FixtureRequest, start_shared: Start) -> Fleet:
    if request.param == "tiny":
        return request.getfixturevalue("tiny_fleet")
    # 46 KB a token, in 30 layers: room for 5,000 tokens.
    return Fleet(start_shared, request.getfixturevalue("smollm2"), "smollm2", (100, 40_000), cache=256 << 20)


def disaggregated(fleet: Fleet, name: str, tokens: list[int], spoil=None, max_tokens: int = 16):
    """Prefill here, decode there; `spoil` changes the offer on its way."""
    params = fleet.p.prefill(name, tokens)
    if spoil:
        spoil(params["kvferry"]["offer"])
    return fleet.d.generate(name, tokens, params=params, max_tokens=max_tokens)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 700])
def test_a_good_day_computes_the_last_token_only(fleet: Fleet, length: int) -> None:
    tokens = fleet.prompt(length)
    done = disaggregated(fleet, f"good-{length}", tokens)
    assert done["tokens"] == fleet.alone(tokens)
    assert done["computed"] == 1
    fleet.settled()


@pytest.mark.parametrize(("missing", "length"), [(2, 300), (0, 300), (9, 300), (9, 319)])
def test_one_lost_block_costs_the_tail_and_no_more(fleet: Fleet, missing: int, length: int) -> None:
    def lose(offer) -> None:
        offer["groups"][0]["blocks"][missing] = None

    tokens = fleet.prompt(length)
    before = fleet.d.metrics()
    done = disaggregated(fleet, f"lost-{missing}-{length}", tokens, lose)
    after = fleet.d.metrics()
    assert done["tokens"] == fleet.alone(tokens)
    assert done["computed"] == length - missing * BLOCK
    # kvferry's own numbers are true after a failure.
    counted = {k: after[k] - before.get(k, 0) for k in ("kvferry_tokens_salvaged", "kvferry_tokens_recomputed")}
    assert counted == {
        "kvferry_tokens_salvaged": missing * BLOCK,
        "kvferry_tokens_recomputed": length - missing * BLOCK,
    }
    causes = "kvferry_blocks_invalid{cause=not_offered}"
    assert after[causes] - before.get(causes, 0) == 1
    fleet.settled()


def test_a_total_failure_is_prefilled_here(fleet: Fleet) -> None:
    def another_life(offer) -> None:
        offer["ranks"][0]["incarnation"] = "00000000000000ab"

    def nobody_there(offer) -> None:
        offer["ranks"][0]["addr"] = "127.0.0.1:9"

    for name, spoil in (("reborn", another_life), ("gone", nobody_there)):
        tokens = fleet.prompt(200)
        done = disaggregated(fleet, name, tokens, spoil)
        assert done["tokens"] == fleet.alone(tokens)
        assert done["computed"] == len(tokens)
        fleet.d.settled()
        # Nobody fetched it: the prefill engine is told, as an operator would have to wait for the lease.
        fleet.p.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker()._offered)]")
        fleet.settled()


def test_a_prefix_that_several_requests_share(fleet: Fleet) -> None:
    prefix = fleet.prompt(160)
    prompts = [prefix + fleet.prompt(40 + i) for i in range(4)]
    params = [fleet.p.prefill(f"shared-{i}", t) for i, t in enumerate(prompts)]
    for i, (t, p) in enumerate(zip(prompts, params, strict=True)):
        fleet.d.add(f"shared-{i}", t, params=p)
    for i, t in enumerate(prompts):
        assert fleet.d.wait("done", f"shared-{i}")["tokens"] == fleet.alone(t)
    fleet.settled()


def test_a_shared_prefix_of_which_each_load_loses_a_block(fleet: Fleet) -> None:
    prefix = fleet.prompt(160)
    prompts = [prefix + fleet.prompt(40) for _ in range(4)]
    params = [fleet.p.prefill(f"sharedlost-{i}", t) for i, t in enumerate(prompts)]
    for i, (t, p) in enumerate(zip(prompts, params, strict=True)):
        p["kvferry"]["offer"]["groups"][0]["blocks"][i] = None
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
    for t, d in zip(prompts, done, strict=True):
        assert d["tokens"] == fleet.alone(t)
        assert d["computed"] == 1
    fleet.settled()
