"""What the scheduler side tells the workers of open offers, by a scheduler's steps."""

from types import SimpleNamespace
from typing import Any

from kvferry.vllm.messages import GroupBlocks
from kvferry.vllm.transfers import Transfers

BLOCK = 16


class Steps:
    """A scheduler and its cache manager."""

    def __init__(self, windows: set[int] = frozenset(), name: str | None = "name") -> None:  # type: ignore[assignment]
        self.blocks: dict[str, tuple[list[int], ...]] = {}
        self.requests: dict[str, Any] = {}
        self.unchanged = True
        groups = {0: BLOCK} | {g: BLOCK for g in windows}
        self.transfers = Transfers(groups, windows, lambda _: name, lambda _: self.unchanged)
        self.transfers.bind(SimpleNamespace(get_block_ids=lambda r: self.blocks[r]))  # type: ignore[arg-type]

    def add(
        self, request_id: str, tokens: int, *blocks: list[int], cached: int = 0, transfer: bool = True, offer_id: str = ""
    ) -> Any:
        request = SimpleNamespace(
            request_id=request_id, num_prompt_tokens=tokens, num_computed_tokens=cached, num_preemptions=0
        )
        self.requests[request_id], self.blocks[request_id] = request, blocks
        if transfer:
            self.transfers.add(request, "transfer", offer_id or f"id-{request_id}")
            self.transfers.looked_up(request_id, cached)
        return request

    def step(self, sync: bool = False, **scheduled: int) -> dict[str, Any]:
        """One step: the messages of it."""
        running = [(r, self.requests[r].num_computed_tokens) for r in scheduled]
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            has_sync_kv_loads=sync,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r for r, _ in running], num_computed_tokens=[n for _, n in running]
            ),
        )
        self.transfers.step(output)  # type: ignore[arg-type]
        for request, n in scheduled.items():
            self.requests[request].num_computed_tokens += n
        return {k: v for k, v in self.transfers.take().items() if v}


def grown(told: dict[str, Any]) -> list[tuple[list[GroupBlocks], int, bool]]:
    return [(g.groups, g.tokens, g.last) for g in told.get("growths", [])]


def test_each_step_lists_the_blocks_that_it_computes() -> None:
    s = Steps()
    s.add("a", 70, [5, 6, 7, 8, 9])
    assert s.step() == {}, "it waits in the queue"
    told = s.step(a=24)
    assert [o.offer_id for o in told["openings"]] == ["id-a"]
    assert grown(told) == [([GroupBlocks(0, 0, [5, 6])], 24, False)]
    assert s.step() == {}
    assert grown(s.step(a=8)) == [([], 32, False)]
    assert grown(s.step(a=38)) == [([GroupBlocks(0, 2, [7, 8, 9])], 70, True)]
    # It goes on with its answer.
    assert s.step(a=1) == {}


def test_cached_blocks_are_readable_at_once_unless_this_step_computes_them() -> None:
    s = Steps()
    s.add("a", 70, [5, 6, 7, 8, 9], cached=48)
    told = s.step(a=10)
    assert [(g.groups, g.tokens) for g in told["cached"]] == [([GroupBlocks(0, 0, [5, 6, 7])], 48)]
    assert grown(told) == [([GroupBlocks(0, 3, [8])], 58, False)]
    # Another request of the same step computes block 7.
    s = Steps()
    s.add("other", 60, [5, 6, 7, 20], transfer=False, cached=32)
    s.add("a", 70, [5, 6, 7, 8, 9], cached=48)
    told = s.step(other=28, a=22)
    assert [(g.groups, g.tokens) for g in told["cached"]] == [([GroupBlocks(0, 0, [5, 6])], 32)]
    assert grown(told) == [([GroupBlocks(0, 2, [7, 8, 9])], 70, True)]


def test_tokens_that_another_connector_loads_are_not_readable_at_once() -> None:
    s = Steps()
    request = s.add("a", 70, [5, 6, 7, 8, 9], cached=16)
    request.num_computed_tokens = 48
    told = s.step(a=22)
    assert [g.tokens for g in told["cached"]] == [16]
    # A load in the step itself may fail, and the offer would have wrong blocks.
    s = Steps()
    request = s.add("a", 70, [5, 6, 7, 8, 9], cached=16)
    request.num_computed_tokens = 48
    assert s.step(sync=True, a=22) == {"dropped": ["id-a"]}
    # So may one of another request, whose blocks are in the prefix cache before they are filled; also of an earlier step, whose
    # outcome is not known yet.
    for earlier in (False, True):
        s = Steps()
        if earlier:
            s.step(sync=True)
        s.add("a", 70, [5, 6, 7, 8, 9], cached=48)
        assert s.step(sync=not earlier, a=22) == {"dropped": ["id-a"]}
        s.add("b", 70, [5, 6, 7, 8, 9])
        assert [o.offer_id for o in s.step(b=22)["openings"]] == ["id-b"]


def test_only_the_first_of_several_requests_with_one_transfer_id_is_offered() -> None:
    s = Steps()
    s.add("a", 70, [5, 6, 7, 8, 9])
    s.step(a=32)
    second = s.add("b", 70, [5, 6, 7, 8, 19], offer_id="id-a")
    assert "openings" not in s.step(a=1, b=32)
    assert s.transfers.finished(second) is None
    # Its end, or its abort, does not end the offer of the first one.
    assert grown(s.step(a=37))[0][1:] == (70, True)


def test_blocks_of_a_window_are_listed_at_the_end() -> None:
    s = Steps(windows={1})
    s.add("a", 70, [5, 6, 7, 8, 9], [25, 26, 27, 28, 29])
    assert grown(s.step(a=48)) == [([GroupBlocks(0, 0, [5, 6, 7])], 48, False)]
    # The engine has freed the first ones, which another request may have.
    s.blocks["a"] = ([5, 6, 7, 8, 9], [0, 0, 27, 28, 29])
    last = [GroupBlocks(0, 3, [8, 9]), GroupBlocks(1, 0, [None, None, 27, 28, 29])]
    assert grown(s.step(a=22)) == [(last, 70, True)]


def test_the_offer_of_a_preempted_prefill_ends_before_its_blocks_are_used_again() -> None:
    s = Steps()
    request = s.add("a", 70, [5, 6, 7, 8, 9])
    s.step(a=32)
    request.num_preemptions, request.num_computed_tokens = 1, 0
    # It may resume within the same step.
    assert s.step(a=32) == {"dropped": ["id-a"]}
    assert s.step(a=38) == {}
    assert s.transfers.finished(request) is None and s.transfers.take()["revokes"] == []
    # Preempted before it was opened: that costs nothing.
    request = s.add("b", 20, [5, 6])
    request.num_preemptions = 1
    s.step()
    assert [o.offer_id for o in s.step(b=20).get("openings", [])] == ["id-b"]


def test_a_prefill_whose_weights_change_is_not_offered_any_more() -> None:
    s = Steps()
    s.add("a", 70, [5, 6, 7, 8, 9])
    s.step(a=32)
    s.unchanged = False
    assert s.step(a=38) == {"dropped": ["id-a"]}


def test_a_decode_engine_hears_of_a_prefill_that_will_not_be_offered() -> None:
    s = Steps(name=None)
    s.add("a", 70, [5, 6, 7, 8, 9])
    assert s.step(a=70) == {"dropped": ["id-a"]}
    s = Steps()
    request = s.add("a", 70, [5, 6, 7, 8, 9])
    assert s.transfers.finished(request) is None, "it was aborted in the queue"
    assert s.step() == {"revokes": ["id-a"]}


def test_blocks_that_cannot_be_told_end_the_offer() -> None:
    s = Steps()
    s.add("a", 70, [5, 6, 7])
    s.step(a=32)
    assert s.step(a=38) == {"dropped": ["id-a"]}
    del s.blocks["a"]
    s.add("b", 20, [8, 9])
    del s.blocks["b"]
    assert s.step(b=20)["dropped"] == ["id-b"]


def test_the_blocks_of_a_finished_prefill_are_held() -> None:
    s = Steps()
    request = s.add("a", 20, [5, 6])
    s.step(a=20)
    growing = s.transfers.finished(request)
    assert growing is not None and growing.complete
    s.transfers.keep(growing)
    (held,) = s.step()["held"]
    assert (held.request, held.offer_id) == ("a", "id-a")
    # Aborted in the middle: revoked, and held until nothing reads it.
    request = s.add("b", 70, [5, 6, 7, 8, 9])
    s.step(b=32)
    growing = s.transfers.finished(request)
    assert growing is not None and not growing.complete
    s.transfers.end(growing)
    told = s.step()
    assert told["revokes"] == ["id-b"] and [h.request for h in told["held"]] == ["b"]
