"""A cache in GPU memory: on the stand-in for libcuda (`tests/cuda`), and with fakes of PyTorch's CUDA part.

The stand-in proves order and lifetimes. No test here runs on a GPU.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import gpu_rank as rank
import pytest
import torch

from kvferry import _native
from kvferry.vllm import pool, worker
from kvferry.vllm.guard import StartFailed
from kvferry.vllm.messages import GroupBlocks, Growth, Handshake, Load, Meta, News, Offering, Opening
from kvferry.vllm.scheduler import SchedulerSide
from kvferry.vllm.worker import WorkerSide

PAGE, BLOCKS = rank.PAGE, rank.BLOCKS

New = Callable[[], rank.Rank]


@pytest.fixture
def new(tmp_path: Path) -> Iterator[New]:
    library = rank.standin()
    if library is None:
        pytest.skip("the stand-in for libcuda is missing: examples/vllm/test builds it")
    ranks: list[rank.Rank] = []

    def start() -> rank.Rank:
        # The ranks share the GPU.
        ranks.append(rank.Rank(library, f"dir={tmp_path}"))
        return ranks[-1]

    yield start
    for one in ranks:
        one.close()


def named(incarnation: str, addr: str, engine: str = "prefill", tokens: int = 16 * BLOCKS) -> str:
    """The name of an offer of a one-rank engine."""
    _, name = _native.name_offer(
        engine=engine,
        incarnation=_native.engine_incarnation([incarnation]),
        ranks=[(0, incarnation, addr)],
        tokens=tokens,
        request="r",
        fingerprints={},
        seal_keys=[],
    )
    return name


def page(data: bytes, layer: int, block: int) -> bytes:
    at = (layer * BLOCKS + block) * PAGE
    return data[at : at + PAGE]


def arrived(theirs: bytes, ours: bytes, blocks: dict[int, int], rest: int) -> None:
    """Checks that the blocks (here: there) hold the producer's bytes, and that all other bytes are `rest`."""
    for layer in range(rank.LAYERS):
        for block in range(BLOCKS):
            want = page(theirs, layer, blocks[block]) if block in blocks else bytes([rest]) * PAGE
            assert page(ours, layer, block) == want, f"layer {layer}, block {block}"


# The consumer's blocks, and the producer's blocks that go into them.
MOVED = {5: 1, 0: 2, 6: 3, 7: 6}
OURS, THEIRS = [(0, 0, list(MOVED))], [(0, 0, list(MOVED.values()))]


either_lane = pytest.mark.parametrize("lane", ["tcp", "local"])


@either_lane
def test_a_pull_from_host_memory_lands_in_gpu_memory(new: New, lane: str) -> None:
    p, c = new(), new()
    name = named(*p(rank.start, "producer", gpu=False, lanes=[lane]))
    c(rank.start, "consumer", gpu=True, lanes=[lane])
    data = os.urandom(rank.SIZE)
    p(rank.write, 0, data)
    c(rank.write, 0, bytes([7]) * rank.SIZE)
    p(rank.enter, name, THEIRS, stream=False)
    c(rank.pull, name, OURS, stream=True)
    assert c(rank.ended) == (len(MOVED), {}, lane)
    arrived(data, c(rank.read, 0, rank.SIZE), MOVED, rest=7)


@either_lane
def test_a_pull_comes_after_the_work_of_the_stream(new: New, lane: str) -> None:
    p, c = new(), new()
    name = named(*p(rank.start, "producer", gpu=False, lanes=[lane]))
    c(rank.start, "consumer", gpu=True, lanes=[lane])
    data = os.urandom(rank.SIZE)
    p(rank.write, 0, data)
    p(rank.enter, name, THEIRS, stream=False)
    c(rank.slow, True)
    # Steps of the blocks' former owner. A pull that did not wait would end first, and be overwritten.
    c(rank.enqueue, 7, 0, rank.SIZE, times=10)
    c(rank.pull, name, OURS, stream=True)
    assert c(rank.ended) == (len(MOVED), {}, lane)
    c(rank.slow, False)
    assert c(rank.count, "memsets") == 10
    arrived(data, c(rank.read, 0, rank.SIZE), MOVED, rest=7)


@either_lane
def test_an_offer_of_gpu_memory_comes_after_the_work_of_the_stream(new: New, lane: str) -> None:
    p, c = new(), new()
    name = named(*p(rank.start, "producer", gpu=True, lanes=[lane]))
    c(rank.start, "consumer", gpu=True, lanes=[lane])
    p(rank.write, 0, bytes(rank.SIZE))
    c(rank.write, 0, bytes([7]) * rank.SIZE)
    p(rank.slow, True)
    # The prefill. Only its last step has the blocks as they are offered.
    p(rank.enqueue, 1, 0, rank.SIZE, times=9)
    p(rank.enqueue, 3, 0, rank.SIZE)
    p(rank.enter, name, THEIRS, stream=True)
    c(rank.pull, name, OURS, stream=True)
    assert c(rank.ended) == (len(MOVED), {}, lane)
    arrived(bytes([3]) * rank.SIZE, c(rank.read, 0, rank.SIZE), MOVED, rest=7)


def test_the_memory_of_a_closed_producer_is_mapped_nowhere(new: New) -> None:
    p, c = new(), new()
    name = named(*p(rank.start, "producer", gpu=True, lanes=["local"]))
    c(rank.start, "consumer", gpu=True, lanes=["local"])
    p(rank.enter, name, THEIRS, stream=True)
    c(rank.pull, name, OURS, stream=True)
    assert c(rank.ended) == (len(MOVED), {}, "local")
    assert c(rank.count, "imports") > 0
    p(rank.close_producer)
    c(rank.wait_without, "imports")


def test_a_stream_that_captures_a_graph_is_refused(new: New) -> None:
    p = new()
    name = named(*p(rank.start, "producer", gpu=True))
    p(rank.capture, True)
    with pytest.raises(ValueError, match="capturing a CUDA graph"):
        p(rank.enter, name, THEIRS, stream=True)
    # The capture is still valid, and the offer can be entered after it.
    p(rank.capture, False)
    p(rank.enter, name, THEIRS, stream=True)


def test_memory_and_streams_of_the_wrong_kind_are_refused(new: New) -> None:
    p = new()
    with pytest.raises(RuntimeError, match="is not GPU memory"):
        p(rank.native_pool, True, address=1 << 20)
    name = named(*p(rank.start, "producer", gpu=False))
    with pytest.raises(ValueError, match="the pool is host memory"):
        p(rank.enter, name, THEIRS, stream=True)


def test_an_offer_for_an_earlier_incarnation_is_refused(new: New) -> None:
    p = new()
    incarnation, addr = p(rank.start, "producer", gpu=False)
    earlier = f"{int(incarnation, 16) ^ 1:016x}"
    with pytest.raises(ValueError, match=f"names incarnation {earlier} of this rank, which is {incarnation}"):
        p(rank.enter, named(earlier, addr), THEIRS, stream=False)
    p(rank.enter, named(incarnation, addr), THEIRS, stream=False)


# ---- the worker side --------------------------------------------------------------------------------------------------


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[list[str]]:
    handler = Log()
    worker.logger.addHandler(handler)
    yield handler.lines
    worker.logger.removeHandler(handler)


LAYOUT = "BLHNC"
CONFIG = fakes.cache_config(4, 6, LAYOUT)


def side(role: str, **more: Any) -> tuple[WorkerSide, dict[str, torch.Tensor]]:
    """A worker side, and tensors for it in host memory."""
    return WorkerSide(fakes.vllm_config(role, LAYOUT, **more), CONFIG), fakes.cpu_tensors(CONFIG, LAYOUT)


def test_without_a_usable_driver_the_engine_does_not_start(log: list[str]) -> None:
    it, host = side("kv_both")
    with fakes.parallel_groups(), pytest.raises(StartFailed, match="kvferry cannot start: the cache is on cuda:0: "):
        it.register(fakes.gpu_tensors(host, 1 << 40))
    (line,) = log
    assert "set on_start_failure to off" in line


def test_without_a_usable_driver_the_engine_runs_without_kvferry_if_the_operator_wants_it(log: list[str]) -> None:
    it, host = side("kv_both", on_start_failure="off")
    with fakes.parallel_groups():
        it.register(fakes.gpu_tensors(host, 1 << 40))
    # No driver, or a real one that knows no such memory.
    (line,) = log
    assert line.startswith("kvferry is off on this engine, which prefills every prompt itself: the cache is on cuda:0: ")
    assert it.handshake() == Handshake(rank=0, addr=None, incarnation=None, pulls=False, off="unsupported_cache")
    assert it.stats.data["up"] == {"0": "unsupported_cache"}
    it.start(Meta([Offering("r", "0" * 32, "{}", [])], [Load("s", "{}", [GroupBlocks(0, 0, [1])])], []))
    report = it.collect(set())
    assert (report.sent, report.received, it.invalid_blocks()) == ({"r"}, {"s"}, {1})


def test_a_kind_of_cache_that_is_not_moved_is_a_warning_and_stops_nothing(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: Any) -> str:
        raise pool.UnsupportedKind("MambaSpec caches are not supported")

    monkeypatch.setattr(pool, "group_kind", unknown)
    it, host = side("kv_both")
    with fakes.parallel_groups():
        it.register(host)
    assert log == [
        "kvferry is off on this engine, which prefills every prompt itself: MambaSpec caches are not supported"
    ]
    assert it.handshake().off == "unsupported_cache_kind"
    assert it.stats.data["up"] == {"0": "unsupported_cache_kind"}


def test_sleep_mode_is_refused_where_vllm_does_not_announce_it(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SLEEP_IS_ANNOUNCED", False)
    it, host = side("kv_both", sleep=True, on_start_failure="off")
    with fakes.parallel_groups():
        it.register(fakes.gpu_tensors(host, 1 << 40))
    assert log == [
        "kvferry is off on this engine, which prefills every prompt itself: sleep mode unmaps GPU memory, and this version of "
        "vLLM does not tell connectors: use vLLM 0.33 or newer, or start without --enable-sleep-mode"
    ]


class Recorder:
    """A producer and a consumer that record what they are given."""

    def __init__(self) -> None:
        self.given: list[tuple[str, int | None]] = []

    def enter(self, offer: str, groups: list[Any], stream: int | None) -> None:
        self.given.append((offer, stream))

    def enter_open(self, offer: str) -> None:
        self.given.append((f"open {offer}", None))

    def grow(self, offer_id: str, groups: list[Any], tokens: int, last: bool, stream: int | None) -> bool:
        self.given.append((f"grow {offer_id} to {tokens}", stream))
        return True

    def pull(self, offer: str, groups: list[Any], stream: int | None, awaited: bool, deadline: float | None) -> int:
        self.given.append((offer, stream))
        return len(self.given)


@pytest.mark.parametrize("gpu", [None, torch.device("cuda", 3)])
def test_each_step_marks_the_stream_that_is_current_when_it_begins(
    gpu: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    it, _ = side("kv_both")
    recorder = Recorder()
    it._producer = it._consumer = it.offers.producer = recorder  # type: ignore[assignment]
    it._gpu = gpu
    current = SimpleNamespace(cuda_stream=0)
    asked: list[torch.device] = []

    def current_stream(device: torch.device) -> Any:
        asked.append(device)
        return current

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    # 0 is the default stream, which is a stream too.
    for step, stream in enumerate((0, 0x55)):
        current.cuda_stream = stream
        it.start(Meta([Offering(f"r{step}", f"{step}", f"offer {step}", [])], [Load(f"s{step}", f"load {step}", [])], []))
    streams = [None, None] if gpu is None else [0, 0x55]
    assert recorder.given == [(f"{what} {step}", streams[step]) for step in (0, 1) for what in ("offer", "load")]
    assert set(asked) == ({gpu} if gpu else set())
    # What a step computes can be read behind its forward pass; what was in the prefix cache, behind the earlier steps.
    recorder.given.clear()
    current.cuda_stream = 1
    opening, early, late = Opening("r", "7", "offer 7"), Growth("7", [], 16, False), Growth("7", [], 40, True)
    it.start(Meta(openings=[opening], cached=[early], growths=[late]))
    assert recorder.given == [("open offer 7", None), ("grow 7 to 16", None if gpu is None else 1)]
    current.cuda_stream = 2
    it.computed()
    assert recorder.given[2:] == [("grow 7 to 40", None if gpu is None else 2)]
    it.computed()
    assert len(recorder.given) == 3


def test_with_a_draft_model_a_step_is_readable_when_the_next_one_begins() -> None:
    it, _ = side("kv_both")
    recorder = Recorder()
    it._producer = it._consumer = it.offers.producer = recorder  # type: ignore[assignment]
    it.offers._drafts = True
    it.start(Meta(openings=[Opening("r", "7", "offer 7")], growths=[Growth("7", [], 16, False)]))
    it.computed()
    assert recorder.given == [("open offer 7", None)]
    it.start(Meta())
    assert recorder.given[1:] == [("grow 7 to 16", None)]


def test_a_step_that_failed_makes_nothing_readable() -> None:
    it, _ = side("kv_both")
    recorder = Recorder()
    it._producer = it._consumer = it.offers.producer = recorder  # type: ignore[assignment]
    it.start(Meta(openings=[Opening("r", "7", "offer 7")], growths=[Growth("7", [], 16, False)]))
    with pytest.raises(RuntimeError):
        try:
            raise RuntimeError("the forward pass failed")
        finally:
            it.computed()
    assert recorder.given == [("open offer 7", None)]


def test_a_step_whose_stream_cannot_be_marked_reports_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    it, _ = side("kv_both")
    it._producer = it._consumer = SimpleNamespace(revoke=lambda _: None, release=lambda _: None)  # type: ignore[assignment]
    it.offers.producer = it._producer
    it._gpu = torch.device("cuda", 0)

    def no_stream(_: torch.device) -> Any:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "current_stream", no_stream)
    it.start(Meta([Offering("r", "1", "offer", [])], [Load("s", "load", [GroupBlocks(0, 0, [4])])], []))
    assert (it._report.sent, it._report.received, it.invalid_blocks()) == ({"r"}, {"s"}, {4})


# ---- sleep ------------------------------------------------------------------------------------------------------------


def offering(request: str, handshake: Handshake, engine: str, block: int) -> Offering:
    name = named(str(handshake.incarnation), str(handshake.addr), engine, fakes.BLOCK_TOKENS)
    return Offering(request, json.loads(name)["id"], name, [GroupBlocks(0, 0, [block])])


def load(request: str, name: str, block: int) -> Meta:
    return Meta([], [Load(request, name, [GroupBlocks(0, 0, [block])])], [])


def test_gpu_memory_is_released_for_sleep_and_registered_at_wake_up(new: New) -> None:
    p, host = side("kv_producer")
    for layer, tensor in enumerate(host.values()):
        tensor.fill_(layer + 1)
    d = new()
    with fakes.parallel_groups():
        p.register(host)
    try:
        theirs = offering("r", p.handshake(), "kv_producer", block=2)
        p.start(Meta([theirs], [], []))
        d(rank.register, CONFIG, LAYOUT)
        assert d(rank.load, load("r", theirs.offer, 4)) == ({"r"}, set())
        stride = CONFIG.kv_cache_tensors[0].block_stride
        block = torch.frombuffer(bytearray(d(rank.read, 4 * stride, stride)), dtype=torch.float32)
        assert [layer.unique().tolist() for layer in block.view(4, -1)] == [[1.0], [2.0], [3.0], [4.0]]

        own = d(rank.handshake)
        # An offer that no engine has claimed yet.
        d(rank.offer, offering("held", own, "kv_both", block=1))
        registrations = d(rank.count, "registrations")
        assert registrations > 0 and not d(rank.pool_is_released)
        # vLLM's order: the connector is told, the memory is unmapped, and after the wake-up it is back.
        assert d(rank.sleep) == ({"held"}, set())
        assert d(rank.count, "registrations") == 0
        assert d(rank.pool_is_released)
        assert d(rank.load, load("asleep", theirs.offer, 3)) == ({"asleep"}, {3})
        restarted = d(rank.wake)
        assert isinstance(restarted, News) and d(rank.news) is None
        (handshake,) = restarted.handshakes
        assert handshake.pulls and handshake.incarnation not in (None, own.incarnation)
        assert d(rank.count, "registrations") == registrations

        again = offering("again", p.handshake(), "kv_producer", block=0)
        p.start(Meta([again], [], []))
        assert d(rank.load, load("again", again.offer, 5)) == ({"again"}, set())
        # A name from before the sleep can still arrive. Its request is reported at once.
        d(rank.offer, offering("late", own, "kv_both", block=1))
        assert d(rank.collected) == {"late"}
    finally:
        p.shutdown()


def test_sleep_and_wake_up_are_idempotent_and_leave_host_memory_alone() -> None:
    it, host = side("kv_both")
    with fakes.parallel_groups():
        it.register(host)
        before = it.handshake()
        assert before.addr and before.pulls
        for _ in range(2):
            it.sleep()
        for _ in range(2):
            it.wake()
        assert it.handshake() == before and it.news() is None
    it.shutdown()


def fails(*_: Any) -> Any:
    raise RuntimeError("a bug")


@pytest.mark.parametrize(
    "consumer",
    [
        SimpleNamespace(close=lambda _: False, pulls=lambda: 0, poll=lambda: []),
        SimpleNamespace(close=lambda _: True, pulls=fails, poll=lambda: []),
    ],
    ids=["does not stop", "fails"],
)
def test_a_rank_that_could_not_release_its_memory_does_not_start_again(log: list[str], consumer: Any) -> None:
    it, _ = side("kv_both")
    it._consumer, it._gpu = consumer, torch.device("cuda", 0)
    try:
        it.sleep()
    except RuntimeError:
        # The connector logs it and goes on.
        pass
    it.wake()
    assert log[-1] == "kvferry is off on this engine: it did not stop before the engine went to sleep; restart it"
    gone = Handshake(rank=0, addr=None, incarnation=None, pulls=False, off="not_stopped_before_sleep")
    assert it.news() == News([replace(gone, weights=it.handshake().weights)])


def scheduler(ranks: int) -> SchedulerSide:
    config = fakes.vllm_config("kv_both", LAYOUT)
    config.parallel_config.tensor_parallel_size = ranks
    side = SchedulerSide(config, CONFIG)
    side.ranks({(0, r): Handshake(r, f"h:{r}", f"{r + 1:016x}", True) for r in range(ranks)})
    return side


def output(restarted: Any) -> Any:
    return SimpleNamespace(
        invalid_block_ids=None, failed_recving=None, finished_recving=None, kv_connector_worker_meta=restarted
    )


def test_the_scheduler_names_offers_after_the_ranks_that_have_restarted() -> None:
    it = scheduler(2)
    before = it._incarnation
    new = [News([Handshake(r, f"h:{r + 10}", f"{r + 11:016x}", True)]) for r in range(2)]
    it.output(output(new[1].aggregate(new[0])))
    assert it._ranks == [(r, f"{r + 11:016x}", f"h:{r + 10}") for r in range(2)]
    assert it._incarnation not in (None, before)
    # A report without a restart changes nothing.
    it.output(output(None))
    assert len(it._ranks) == 2


def test_the_scheduler_neither_offers_nor_loads_without_a_rank_that_did_not_restart() -> None:
    it = scheduler(2)
    it.output(output(News([Handshake(1, None, None, False)])))
    assert (it._ranks, it._incarnation, it._pulls_here) == ([], None, False)
    it.output(output(News([Handshake(1, "h:1", "00000000000000ff", True)])))
    assert it._pulls_here and it._incarnation is not None
