"""Compares kvferry with vLLM's NIXL connector: two pairs of servers on this machine, measured in turn.

`python tools/compare.py [--model tiny|smollm2] [--rounds 20] [--kills]` prints the time from a request to its first token,
as the median of all rounds. With `--kills` it also prints the time to an answer after a `kill -9` of the prefill server.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import servers

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvferry" / "vllm"


class Pair:
    def __init__(self, name: str, model: str, logs: Path, tls: str | None) -> None:
        self.name = name
        ports = [servers.free_port(), servers.free_port()]
        env = [{"VLLM_NIXL_SIDE_CHANNEL_PORT": str(p)} | ({"UCX_TLS": tls} if tls else {}) for p in ports]

        def transfer(role: str, port: int) -> dict[str, Any]:
            if name == "kvferry":
                return servers.kvferry_config(role, **({"port": port} if role == "kv_producer" else {}))
            return {"kv_connector": "NixlConnector", "kv_role": role, "kv_load_failure_policy": "recompute"}

        self.prefill = servers.vllm(f"{name}-prefill", model, logs, transfer("kv_producer", ports[0]), env[0])
        self.decode = servers.vllm(f"{name}-decode", model, logs, transfer("kv_consumer", ports[1]), env[1])

    def start(self) -> "Pair":
        self.prefill.start()
        self.decode.start()
        return self

    def healthy(self) -> "Pair":
        self.prefill.healthy()
        self.decode.healthy()
        return self

    def params(self, prompt: list[int]) -> dict[str, Any]:
        asked = {"do_remote_decode": True, "do_remote_prefill": False}
        return servers.complete(self.prefill.url, prompt, 1, kv_transfer_params=asked)["kv_transfer_params"]

    def first_token(self, prompt: list[int]) -> float:
        began = time.monotonic()
        servers.complete(self.decode.url, prompt, 1, kv_transfer_params=self.params(prompt))
        return time.monotonic() - began

    def after(self, params: dict[str, Any], prompt: list[int]) -> float:
        began = time.monotonic()
        servers.complete(self.decode.url, prompt, 1, limit=600, kv_transfer_params=params)
        return time.monotonic() - began

    def kill_cases(self, prompt: Any) -> Iterator[tuple[str, float]]:
        """The prefill server dies after its answer, before the decode server fetches the KV."""
        self.first_token(prompt())
        one, two = prompt(), prompt()
        params, late = self.params(one), self.params(two)
        self.prefill.kill()
        yield "killed after the handshake", self.after(params, one)
        self.prefill.start().healthy()
        yield "a new prefill at the same address, old parameters", self.after(late, two)
        fresh = prompt()
        yield "the next request through the new prefill", self.first_token(fresh)
        self.decode.stop()
        self.decode.start().healthy()
        three = prompt()
        params = self.params(three)
        self.prefill.kill()
        yield "killed before the handshake", self.after(params, three)

    def stop(self) -> None:
        self.decode.kill()
        self.prefill.kill()


def main() -> None:
    # On SIGTERM too, the servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=sorted(models.MAKERS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--only", choices=["kvferry", "nixl"], help="measure one pair only")
    parser.add_argument("--ucx-tls", help="UCX_TLS of the NIXL pair, for example tcp; by default UCX chooses")
    args = parser.parse_args()
    model = str(models.make(args.model, CACHE / "models" / f"{args.model}-1"))
    logs = Path(tempfile.mkdtemp(prefix="kvferry-compare-"))
    print(f"logs: {logs}", flush=True)
    dice = random.Random(1)

    def prompt() -> list[int]:
        return [dice.randrange(4, 259) for _ in range(args.tokens)]

    pairs = [Pair("kvferry", model, logs, None), Pair("nixl", model, logs, args.ucx_tls)]
    pairs = [pair for pair in pairs if args.only in (None, pair.name)]
    try:
        for pair in pairs:
            pair.start()
        for pair in pairs:
            pair.healthy()
            for _ in range(3):
                pair.first_token(prompt())
        times: dict[str, list[float]] = {pair.name: [] for pair in pairs}
        for i in range(args.rounds):
            for pair in pairs if i % 2 else reversed(pairs):
                times[pair.name].append(pair.first_token(prompt()))
        for name, t in times.items() if args.rounds else ():
            print(f"{name}: time to first token {statistics.median(t) * 1e3:.1f} ms (median of {len(t)})", flush=True)
        for pair in pairs:
            before, began = pair.decode.cpu_seconds(), time.monotonic()
            time.sleep(5)
            share = (pair.decode.cpu_seconds() - before) / (time.monotonic() - began)
            print(f"{pair.name}: idle decode server: {share:.1%} of a core", flush=True)
        for pair in pairs if args.kills else ():
            for case, seconds in pair.kill_cases(prompt):
                print(f"{pair.name}: {case}: answered after {seconds:.2f} s", flush=True)
    finally:
        for pair in pairs:
            pair.stop()


if __name__ == "__main__":
    main()
