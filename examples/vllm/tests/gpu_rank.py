"""A rank in a process of its own, with the stand-in for libcuda preloaded. Its functions run in that process, one at a time.

The stand-in (`tests/cuda`) has device memory that only driver calls reach, and streams that hold work. Its functions
`kvferry_standin_…` read and write device memory behind the driver's back.
"""

import ctypes
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from driver import LIMIT

BLOCKS, LAYERS, PAGE = 8, 3, 4096
SIZE = BLOCKS * LAYERS * PAGE
# Seconds that one operation on a stream takes at least, where a test wants work that lasts.
SLOW = 0.1


def standin() -> Path | None:
    """The stand-in's library, which `test` builds."""
    given = os.environ.get("KVFERRY_CUDA_STANDIN")
    return Path(given) if given and Path(given).exists() else None


class Rank:
    """Runs functions of this module in the rank's process."""

    def __init__(self, library: Path, settings: str = "") -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        with mock.patch.dict(os.environ, LD_PRELOAD=str(library), KVFERRY_STANDIN=settings):
            self(open_driver)

    def __call__(self, function: Any, *args: Any, **more: Any) -> Any:
        return self._pool.submit(function, *args, **more).result(LIMIT)

    def close(self) -> None:
        self._pool.submit(end)
        self._pool.shutdown()


here = SimpleNamespace(cuda=None, stream=0, address=0, host=None, producer=None, consumer=None, side=None, groups=None)


def check(code: int) -> None:
    assert code == 0, f"the stand-in answers {code}"


def open_driver() -> None:
    here.cuda = ctypes.CDLL("libcuda.so")
    context = ctypes.c_size_t()
    check(here.cuda.cuInit(0))
    check(here.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
    check(here.cuda.cuCtxSetCurrent(context))
    stream = ctypes.c_size_t()
    check(here.cuda.cuStreamCreate(ctypes.byref(stream), 1))
    here.stream = stream.value


def end() -> None:
    for part in (here.consumer, here.producer):
        if part is not None:
            part.close(5)
    if here.side is not None:
        here.side.shutdown()


# ---- device memory ----------------------------------------------------------------------------------------------------


def allocate(size: int = SIZE) -> int:
    """Allocates the rank's GPU memory, as an engine does, and returns its address."""
    address = ctypes.c_uint64()
    check(here.cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)))
    here.address = address.value
    return here.address


def write(offset: int, data: bytes) -> None:
    if here.host is not None:
        here.host[offset : offset + len(data)] = data
        return
    check(here.cuda.kvferry_standin_write(ctypes.c_uint64(here.address + offset), data, ctypes.c_size_t(len(data))))


def read(offset: int, length: int) -> bytes:
    if here.host is not None:
        return bytes(here.host[offset : offset + length])
    buffer = ctypes.create_string_buffer(length)
    check(here.cuda.kvferry_standin_read(ctypes.c_uint64(here.address + offset), buffer, ctypes.c_size_t(length)))
    return buffer.raw


def slow(on: bool) -> None:
    """While on, each operation on a stream takes a while."""
    here.cuda.kvferry_standin_set_delay(ctypes.c_uint64(int(SLOW * 1e9) if on else 0))


def enqueue(value: int, offset: int, length: int, times: int = 1) -> None:
    """The engine's stream will set bytes of the rank's memory, `times` times."""
    at, length_ = ctypes.c_uint64(here.address + offset), ctypes.c_size_t(length)
    for _ in range(times):
        check(here.cuda.cuMemsetD8Async(at, ctypes.c_ubyte(value), length_, ctypes.c_size_t(here.stream)))


def capture(on: bool) -> None:
    """Begins or ends the capture of a graph on the engine's stream."""
    if on:
        check(here.cuda.cuStreamBeginCapture_v2(ctypes.c_size_t(here.stream), 2))
    else:
        graph = ctypes.c_size_t()
        check(here.cuda.cuStreamEndCapture(ctypes.c_size_t(here.stream), ctypes.byref(graph)))


def count(name: str) -> int:
    """One of the stand-in's counters; their order is that of `Counts` in tests/cuda/src/control.rs."""
    names = (
        "calls flushes launches kernel_copies host_to_device device_to_host device_to_device host_to_host batches memsets "
        "operations invalidated_captures allocations physical imports mappings reservations registrations streams events modules"
    ).split()
    counts = (ctypes.c_uint64 * len(names))()
    check(here.cuda.kvferry_standin_counts(counts))
    return dict(zip(names, counts, strict=True))[name]


def wait_without(name: str) -> None:
    """Waits until a counter is zero."""
    until = time.monotonic() + LIMIT
    while count(name):
        assert time.monotonic() < until, f"there are still {name}"
        time.sleep(0.001)


# ---- the native module ------------------------------------------------------------------------------------------------


def native_pool(gpu: bool, address: int | None = None) -> Any:
    """One group with a region for each layer, in GPU memory or in host memory."""
    from kvferry import _native

    if address is None and gpu:
        address = allocate()
    elif address is None:
        here.host = bytearray(SIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(here.host))
    regions = [(f"layer {i}", 0, i * BLOCKS * PAGE, PAGE, PAGE) for i in range(LAYERS)]
    return _native.Pool([(address, SIZE)], [(0, "full", 16, BLOCKS, regions)], here.host, gpu)


def identity(engine: str) -> Any:
    from kvferry import _native

    return _native.Identity(
        engine=engine,
        rank=0,
        tp=(0, 1),
        pp=(0, 1),
        heads=(0, 1),
        layers=(0, LAYERS),
        model="m",
        dtype="int8",
        scales="",
        weights="",
        attention="",
        block_tokens=16,
    )


def start(role: str, gpu: bool, lanes: list[str] | None = None) -> tuple[str, str] | None:
    """Starts a producer or a consumer on new memory. A producer returns its `(incarnation, address)`."""
    from kvferry import _native

    pool, settings = native_pool(gpu), _native.Settings(deadline=LIMIT, gpu_ring=1 << 20, lanes=lanes)
    assert pool.place == ("GPU 0" if gpu else "host memory")
    if role == "consumer":
        here.consumer = _native.Consumer(identity("decode"), pool, settings)
        return None
    here.producer = _native.Producer(identity("prefill"), pool, settings, "127.0.0.1:0")
    return here.producer.incarnation, here.producer.addr


def close_producer() -> None:
    assert here.producer.close(5)


def enter(name: str, blocks: list[Any], stream: bool) -> None:
    here.producer.enter(name, blocks, here.stream if stream else None)


def pull(name: str, blocks: list[Any], stream: bool) -> int:
    return here.consumer.pull(name, blocks, here.stream if stream else None)


def ended() -> tuple[int, dict[str, int], str | None]:
    """Waits for the end of a pull: the number of loaded blocks, the causes of invalid ones, and the lane."""
    until = time.monotonic() + LIMIT
    while not (ended := here.consumer.poll()):
        assert time.monotonic() < until, "the pull does not end"
        time.sleep(0.001)
    (one,) = ended
    return one.loaded, one.causes, one.lane


# ---- the worker side --------------------------------------------------------------------------------------------------


def register(config: Any, layout: str) -> None:
    """Starts a worker side whose tensors are in the rank's GPU memory, and whose compute stream is the rank's stream."""
    import fakes
    import torch

    from kvferry.vllm import worker

    # As vLLM 0.33.
    worker.SLEEP_IS_ANNOUNCED = True
    torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=here.stream)  # type: ignore[assignment]
    tensors = fakes.gpu_tensors(fakes.cpu_tensors(config, layout), allocate(config.kv_cache_tensors[0].size))
    here.side = worker.WorkerSide(fakes.vllm_config("kv_both", layout, sleep=True, gpu_ring=1 << 20), config)
    here.groups = fakes.parallel_groups()
    here.groups.__enter__()
    here.side.register(tensors)


def handshake() -> Any:
    return here.side.handshake()


def load(meta: Any) -> tuple[set[str], set[int]]:
    """Starts a step with one load, and waits for its report: the received requests, and the invalid blocks."""
    here.side.start(meta)
    until = time.monotonic() + LIMIT
    while not (report := here.side.collect(set())).received:
        assert time.monotonic() < until, "the load is not reported"
        time.sleep(0.001)
    return report.received, here.side.invalid_blocks()


def offer(offering: Any) -> None:
    """Starts a step with one offer."""
    from kvferry.vllm.messages import Meta

    here.side.start(Meta([offering], [], []))


def collected() -> set[str]:
    return here.side.collect(set()).sent


def sleep() -> tuple[set[str], set[int]]:
    """vLLM's order: the connector is told first, then the memory goes. Returns the sent and the invalid ones."""
    here.side.sleep()
    report = here.side.collect(set())
    return report.sent, here.side.invalid_blocks()


def pool_is_released() -> bool:
    """Whether the native module has dropped its hold on the tensors: the list of them that it was given."""
    import gc

    from kvferry import _native

    # Objects that were dropped without the interpreter's lock go with the next call.
    _native.engine_incarnation(["0" * 15 + "1"])
    tensor = next(iter(here.side._registered.values()))
    return not any(isinstance(holder, list) for holder in gc.get_referrers(tensor))


def wake() -> Any:
    here.side.wake()
    return news()


def news() -> Any:
    return here.side.news()
