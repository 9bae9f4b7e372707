"""READs of scattered blocks by NIXL's agent over UCX, from another process. One JSON line a block size."""
import json
import statistics
import sys
import time

import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config

from server import Server


def agent(name):
    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def serve(total):
    a = agent("target")
    memory = np.random.randint(0, 255, total, dtype=np.uint8)
    a.register_memory([(memory.ctypes.data, total, 0, "")], "DRAM")
    return (a.get_agent_metadata(), memory.ctypes.data), (a, memory)


def main():
    total, sizes = int(sys.argv[1]) << 20, [int(x) for x in sys.argv[2].split(",")]
    server = Server(serve, total)
    metadata, base = server.ready()
    a = agent("initiator")
    memory = np.zeros(total, dtype=np.uint8)
    a.register_memory([(memory.ctypes.data, total, 0, "")], "DRAM")
    peer = a.add_remote_agent(metadata)
    for size in sizes:
        n = total // size
        order = np.random.permutation(n)
        here = a.prep_xfer_dlist("NIXL_INIT_AGENT", [(memory.ctypes.data + i * size, size, 0) for i in range(n)], "DRAM")
        there = a.prep_xfer_dlist(peer, [(base + int(order[i]) * size, size, 0) for i in range(n)], "DRAM")
        ids = np.arange(n, dtype=np.int32)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            handle = a.make_prepped_xfer("READ", here, ids, there, ids, b"done")
            state = a.transfer(handle)
            while state != "DONE":
                if state == "ERR":
                    raise SystemExit("the transfer failed")
                state = a.check_xfer_state(handle)
            times.append(time.perf_counter() - start)
            a.release_xfer_handle(handle)
        print(json.dumps({"block_size": size, "gb_per_s": total / statistics.median(times[1:]) / 1e9}), flush=True)
    server.stop()


if __name__ == "__main__":
    main()
