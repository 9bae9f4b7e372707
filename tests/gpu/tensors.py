"""Moves blocks between tensors of two processes, allocated by torch as vLLM allocates its cache: one storage, with the layers as
strided views. Over `local` and over `tcp`, each after the work of a CUDA stream.

    python3 tensors.py          tensors on the GPU
    python3 tensors.py cpu      tensors in host memory, which tests this script
"""

import json
import subprocess
import sys
import time

import torch
from kvferry import _native

LAYERS, BLOCKS, PAGE, TOKENS = 8, 256, 16 << 10, 16
DEVICE = "cpu" if "cpu" in sys.argv else "cuda"
LIMIT = 20.0


def content(salt: int) -> torch.Tensor:
    """The bytes of a pool, one row for each layer and block."""
    rows = torch.arange(LAYERS * BLOCKS, device=DEVICE).unsqueeze(1)
    columns = torch.arange(PAGE, device=DEVICE)
    return ((rows * 31 + columns // 7 + salt) % 251).to(torch.int8)


def pool(cache: torch.Tensor) -> _native.Pool:
    regions = [(f"layers.{i}", 0, i * BLOCKS * PAGE, PAGE, PAGE) for i in range(LAYERS)]
    storage = cache.untyped_storage()
    segments = [(storage.data_ptr(), LAYERS * BLOCKS * PAGE)]
    return _native.Pool(segments, [(0, "full", TOKENS, BLOCKS, regions)], cache, DEVICE == "cuda")


def identity(engine: str) -> _native.Identity:
    return _native.Identity(
        engine=engine,
        rank=0,
        tp=(0, 1),
        pp=(0, 1),
        heads=(0, 1),
        layers=(0, LAYERS),
        model="tensors",
        dtype="int8",
        scales="",
        attention="HND",
        block_tokens=TOKENS,
    )


def stream() -> int | None:
    return torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else None


def serve() -> None:
    """The producer: fills its blocks in a stream, and enters the names that it reads."""
    cache = torch.zeros(LAYERS * BLOCKS, PAGE, dtype=torch.int8, device=DEVICE)
    producer = _native.Producer(identity("prefill"), pool(cache), _native.Settings(), "127.0.0.1:0")
    print(json.dumps([producer.incarnation, producer.addr]), flush=True)
    for line in sys.stdin:
        name, salt, blocks = json.loads(line)
        cache.copy_(content(salt))
        producer.enter(name, [(0, 0, blocks)], stream())
        print(json.dumps("entered"), flush=True)
    producer.close(LIMIT)


def pull(lane: str, salt: int, child: subprocess.Popen[str], incarnation: str, addr: str) -> None:
    assert child.stdin and child.stdout
    cache = torch.zeros(LAYERS * BLOCKS, PAGE, dtype=torch.int8, device=DEVICE)
    consumer = _native.Consumer(identity("decode"), pool(cache), _native.Settings(lanes=[lane], deadline=LIMIT))
    _, name = _native.name_offer(
        engine="prefill",
        incarnation=_native.engine_incarnation([incarnation]),
        ranks=[(0, incarnation, addr)],
        tokens=BLOCKS * TOKENS,
        request=lane,
        fingerprints={},
        seal_keys=[],
    )
    theirs = [(b * 77 + salt) % BLOCKS for b in range(BLOCKS)]
    child.stdin.write(json.dumps([name, salt, theirs]) + "\n")
    child.stdin.flush()
    assert json.loads(child.stdout.readline()) == "entered"
    # The pull comes after this write: otherwise the bytes that arrive would be overwritten.
    cache.fill_(-1)
    consumer.pull(name, [(0, 0, list(range(BLOCKS)))], stream())
    until = time.monotonic() + 2 * LIMIT
    while not (ended := consumer.poll()):
        assert time.monotonic() < until, "the pull does not end"
        time.sleep(0.001)
    assert ended[0].loaded == BLOCKS and not ended[0].invalid, ended[0].causes
    assert ended[0].lane == lane, ended[0].lane
    want = content(salt).view(LAYERS, BLOCKS, PAGE)[:, theirs]
    assert torch.equal(cache.view(LAYERS, BLOCKS, PAGE), want), f"{lane}: wrong bytes"
    assert consumer.close(LIMIT)
    print(f"{lane}: {BLOCKS} blocks of {LAYERS} layers are exact")


def main() -> None:
    if "serve" in sys.argv:
        return serve()
    arguments = [sys.executable, __file__, "serve", *sys.argv[1:]]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin and child.stdout
        try:
            incarnation, addr = json.loads(child.stdout.readline())
            for salt, lane in enumerate(["tcp", "local"]):
                pull(lane, salt, child, incarnation, addr)
        finally:
            child.stdin.close()
    assert child.returncode == 0, f"the producer has failed ({child.returncode})"


main()
