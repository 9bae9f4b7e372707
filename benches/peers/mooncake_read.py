"""READs of scattered blocks by Mooncake's Transfer Engine over TCP, from another process. One JSON line a block size.

At most 64 MiB a transfer: 256 MiB in scattered blocks failed here with version 0.3.13.
"""
import json
import statistics
import sys
import time

import numpy as np

from server import Server


def engine(port):
    from mooncake.engine import TransferEngine
    e = TransferEngine()
    if e.initialize(f"127.0.0.1:{port}", "P2PHANDSHAKE", "tcp", "") != 0:
        raise SystemExit("the transfer engine did not start")
    return e


def serve(total):
    e = engine(12345)
    memory = np.random.randint(0, 255, total, dtype=np.uint8)
    e.register_memory(memory.ctypes.data, total)
    return (f"127.0.0.1:{e.get_rpc_port()}", memory.ctypes.data), (e, memory)


def main():
    total, sizes = min(int(sys.argv[1]), 64) << 20, [int(x) for x in sys.argv[2].split(",")]
    server = Server(serve, total)
    session, base = server.ready()
    e = engine(12346)
    memory = np.zeros(total, dtype=np.uint8)
    e.register_memory(memory.ctypes.data, total)
    # Below 64 KiB it takes minutes for 256 MiB, when it does not fail.
    for size in [s for s in sizes if s >= 1 << 16]:
        n = total // size
        order = np.random.permutation(n)
        here = [memory.ctypes.data + i * size for i in range(n)]
        there = [base + int(order[i]) * size for i in range(n)]
        times = []
        for _ in range(5):
            start = time.perf_counter()
            if e.batch_transfer_sync_read(session, here, there, [size] * n) != 0:
                break
            times.append(time.perf_counter() - start)
        if len(times) > 1:
            rate = total / statistics.median(times[1:]) / 1e9
            print(json.dumps({"block_size": size, "gb_per_s": rate}), flush=True)
    server.stop()


if __name__ == "__main__":
    main()
