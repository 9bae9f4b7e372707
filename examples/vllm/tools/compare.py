"""Compares kvferry with vLLM's NIXL connector on this machine, and prints a Markdown table.

`python tools/compare.py [--rounds 3] [--only kvferry|nixl] [--ucx-tls tcp]`
`python tools/compare.py --hand-over [--lengths 1000,2000,4000,8000] [--requests 20]`

Pairs of servers run one after the other, so that the progress threads of one never take time from another. In each round a
pair starts, is measured, loses its prefill server in several ways, and ends. Every answer is compared with that of the decode
server alone. With the defaults the run takes half an hour on two cores; run nothing beside it.

With `--hand-over` it measures the stages of requests instead, with overlap and without; see `handover.py`.

On vLLM 0.33: PYTHONPATH=$($PYTHON tools/versions.py 0.33):$PYTHONPATH VLLM_TARGET_DEVICE=cpu $PYTHON tools/compare.py
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import re
import signal
import statistics
import sys
import tempfile
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handover
import models
import servers
import versions

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvferry" / "vllm"
# Longest wait in seconds for an answer: the decode server of a stopped peer, and every other one.
STOPPED_LIMIT = 60
LIMIT = 600
# Seconds over which processor time is measured. vLLM's ranks spin for a second after a step, so a shorter time shows mostly that.
CPU_SECONDS = 15

FIRST = "first request ever, handshake included"
TOTAL = "request to first token"
LEG = "of which the decode leg"
IDLE_PREFILL = "idle prefill engine"
IDLE_DECODE = "idle decode engine"
HELD = "prefill engine while one unclaimed offer is held"
KILLED = "kill -9 of the prefill after the handshake: decode answered after"
OLD = "a new prefill at the same address, old parameters"
NEXT = "the next request through the new prefill"
UNMET = "kill -9 before the handshake: decode answered after"
STOPPED = "SIGSTOP of the prefill: decode answered after"
ROWS = [FIRST, TOTAL, LEG, IDLE_PREFILL, IDLE_DECODE, HELD, KILLED, OLD, NEXT, UNMET, STOPPED]
SHARES = {IDLE_PREFILL, IDLE_DECODE, HELD}

# Seconds (or a share of a core), or the reason why there is no answer.
Value = float | str
Prompt = Callable[[], list[int]]


class Pair:
    """A prefill and a decode server with one connector."""

    def __init__(self, name: str, model: str, logs: Path, tls: str | None) -> None:
        ports = [servers.free_port(), servers.free_port()]
        env = [{"VLLM_NIXL_SIDE_CHANNEL_PORT": str(p)} | ({"UCX_TLS": tls} if tls else {}) for p in ports]

        def transfer(role: str, port: int) -> dict[str, Any]:
            if name == "kvferry":
                return servers.kvferry_config(role, **({"port": port} if role == "kv_producer" else {}))
            return {"kv_connector": "NixlConnector", "kv_role": role, "kv_load_failure_policy": "recompute"}

        self.prefill = servers.vllm(f"{name}-prefill", model, logs, transfer("kv_producer", ports[0]), env[0])
        self.decode = servers.vllm(f"{name}-decode", model, logs, transfer("kv_consumer", ports[1]), env[1])
        self.seen: dict[str, list[Value]] = {row: [] for row in ROWS}
        self._answers: list[tuple[list[int], str]] = []
        self.answers = self.wrong = 0

    def start(self) -> None:
        self.prefill.start()
        self.decode.start()
        self.prefill.healthy()
        self.decode.healthy()

    def stop(self) -> None:
        self.decode.kill()
        self.prefill.kill()

    def hand_over(self, prompt: list[int]) -> dict[str, Any]:
        """Prefills the prompt and returns the params for the decode server."""
        asked = {"do_remote_decode": True, "do_remote_prefill": False}
        return servers.complete(self.prefill.url, prompt, 1, LIMIT, kv_transfer_params=asked)["kv_transfer_params"]

    def decoded(self, prompt: list[int], params: dict[str, Any], limit: float = LIMIT) -> Value:
        """The time to the first token of the decode server."""
        began = time.monotonic()
        try:
            answer = servers.complete(self.decode.url, prompt, 1, limit, kv_transfer_params=params)
        except TimeoutError:
            return f"none within {limit:.0f} s"
        except urllib.error.HTTPError as e:
            return f"HTTP {e.code}"
        except OSError as e:
            return "none: the decode server has exited" if self.decode.process.poll() is not None else f"none: {e}"
        took = time.monotonic() - began
        self._answers.append((prompt, answer["choices"][0]["text"]))
        return took

    def first_token(self, prompt: list[int]) -> tuple[Value, Value]:
        """The time of a whole request, and of its decode leg."""
        began = time.monotonic()
        params = self.hand_over(prompt)
        prefilled = time.monotonic() - began
        leg = self.decoded(prompt, params)
        return leg if isinstance(leg, str) else prefilled + leg, leg

    def check(self) -> None:
        """Compares the answers so far with those of the decode server alone. The salt keeps it from using loaded blocks."""
        for prompt, text in self._answers:
            alone = servers.complete(self.decode.url, prompt, 1, LIMIT, cache_salt="alone")["choices"][0]["text"]
            self.answers += 1
            self.wrong += alone != text
        self._answers.clear()

    def round(self, prompt: Prompt, requests: int) -> None:
        seen = self.seen
        self.start()
        # Without transfer: what a first prompt costs in the engine itself is not the connector's.
        for server in (self.prefill, self.decode):
            servers.complete(server.url, prompt(), 1, LIMIT)
        seen[FIRST].append(self.first_token(prompt())[0])
        for _ in range(requests):
            total, leg = self.first_token(prompt())
            seen[TOTAL].append(total)
            seen[LEG].append(leg)
        self.check()
        time.sleep(CPU_SECONDS)
        for row, share in zip((IDLE_PREFILL, IDLE_DECODE), cpu(self.prefill, self.decode), strict=True):
            seen[row].append(share)
        held = prompt()
        params = self.hand_over(held)
        time.sleep(2)
        seen[HELD].extend(cpu(self.prefill))
        self.decoded(held, params)

        one, two = prompt(), prompt()
        params, old = self.hand_over(one), self.hand_over(two)
        self.prefill.kill()
        seen[KILLED].append(self.decoded(one, params))
        self.prefill.start().healthy()
        seen[OLD].append(self.decoded(two, old))
        seen[NEXT].append(self.first_token(prompt())[0])
        self.check()

        self.decode.stop()
        self.decode.start().healthy()
        servers.complete(self.decode.url, prompt(), 1, LIMIT)
        one = prompt()
        params = self.hand_over(one)
        self.prefill.kill()
        seen[UNMET].append(self.decoded(one, params))
        self.prefill.start().healthy()
        self.first_token(prompt())
        one = prompt()
        params = self.hand_over(one)
        assert self.prefill.process is not None
        os.killpg(self.prefill.process.pid, signal.SIGSTOP)
        seen[STOPPED].append(self.decoded(one, params, STOPPED_LIMIT))
        self.check()


def cpu(*measured: servers.Process) -> list[float]:
    """The processor time of each server, as a share of a core."""
    before, began = [s.cpu_seconds() for s in measured], time.monotonic()
    time.sleep(CPU_SECONDS)
    took = time.monotonic() - began
    return [(s.cpu_seconds() - b) / took for s, b in zip(measured, before, strict=True)]


def cell(row: str, values: list[Value]) -> str:
    """The median and the range of a row's values, and how often there was no answer."""
    times = [v for v in values if not isinstance(v, str)]
    reasons = [v for v in values if isinstance(v, str)]
    parts = []
    if times:
        form = (lambda v: f"{v:.1%}") if row in SHARES else (lambda v: f"{v:.3f} s" if v < 1 else f"{v:.2f} s")
        low, middle, high = form(min(times)), form(statistics.median(times)), form(max(times))
        parts.append(middle if low == high else f"{middle} ({low} to {high})")
    for reason in dict.fromkeys(reasons):
        n = reasons.count(reason)
        parts.append(reason if n == len(values) else f"{reason} ({n} of {len(values)})")
    return "; ".join(parts) or "-"


def table(pairs: dict[str, Pair]) -> str:
    lines = ["| | " + " | ".join(pairs) + " |", "| --- |" + " --- |" * len(pairs)]
    for row in ROWS:
        lines.append(f"| {row} | " + " | ".join(cell(row, p.seen[row]) for p in pairs.values()) + " |")
    lines.append("| wrong answers | " + " | ".join(f"{p.wrong} of {p.answers}" for p in pairs.values()) + " |")
    return "\n".join(lines)


def machine(args: argparse.Namespace, load: float) -> str:
    """The date, the machine and the versions."""
    cpus = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    tls = f"UCX_TLS={args.ucx_tls}" if args.ucx_tls else "UCX auto"
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of {cpus[1] if cpus else platform.machine()}, Linux "
        f"{platform.release()}, load {load:.1f} before the start. vLLM {versions.running()}, kvferry "
        f"{importlib.metadata.version('kvferry')}, NIXL {importlib.metadata.version('nixl')} ({tls}), model {args.model}."
    )


def conditions(args: argparse.Namespace, load: float) -> str:
    return (
        f"{machine(args, load)} Prompts of {args.tokens} tokens. Rounds: {args.rounds}, each with {args.requests} requests for the "
        "second and third row; medians, and ranges in brackets."
    )


def main() -> None:
    # On SIGTERM too, the servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="lives of each pair")
    parser.add_argument("--requests", type=int, default=21, help="requests of a round whose median is taken")
    parser.add_argument("--model", default="tiny", choices=sorted(models.MAKERS))
    parser.add_argument("--tokens", type=int, default=1000, help="length of the prompts")
    parser.add_argument("--only", choices=["kvferry", "nixl"], help="measure one of them")
    parser.add_argument("--ucx-tls", help="UCX_TLS of the NIXL pair, for example tcp; by default UCX chooses")
    parser.add_argument("--json", type=Path, help="also write all values to this file")
    parser.add_argument("--hand-over", action="store_true", help="measure the stages of a request")
    parser.add_argument("--budget", type=float, default=300, help="most seconds for a connector and a length with --hand-over")
    parser.add_argument("--lengths", default="1000,2000,4000,8000", help="lengths of the prompts for --hand-over")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    model = str(models.make(args.model, CACHE / "models" / f"{args.model}-1"))
    logs = Path(tempfile.mkdtemp(prefix="kvferry-compare-"))
    print(f"logs: {logs}", file=sys.stderr, flush=True)
    dice = random.Random(1)

    def prompt(tokens: int = args.tokens) -> list[int]:
        return [dice.randrange(4, 259) for _ in range(tokens)]

    if args.hand_over:
        lengths = [int(n) for n in args.lengths.split(",")]
        names = [n for n in ("kvferry", "nixl") if args.only in (None, n)]
        requests = min(args.requests, 20)

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        def pair(name: str) -> handover.Pair:
            return handover.Pair(name, model, logs, args.ucx_tls)

        seen, answers = handover.measure(names, pair, prompt, lengths, requests, args.rounds, args.budget, say)
        print(handover.table(seen))
        wrong = ", ".join(f"{n} {w} of {a}" for n, (w, a) in answers.items())
        print(
            f"\nWrong answers: {wrong}. Milliseconds since the request was sent. Medians; the number of requests is in brackets. "
            f"Rounds: {args.rounds}."
        )
        print(machine(args, load))
        return

    names = {"kvferry": "kvferry", "nixl": "NIXL connector"}
    pairs = {text: Pair(n, model, logs, args.ucx_tls) for n, text in names.items() if args.only in (None, n)}
    failed = False
    for i in range(args.rounds):
        for text, pair in pairs.items():
            print(f"round {i + 1} of {args.rounds}: {text}", file=sys.stderr, flush=True)
            try:
                pair.round(prompt, args.requests)
            except (OSError, RuntimeError) as e:
                # The other rounds, and what this one has measured, still count.
                print(f"round {i + 1} of {text} ended early: {e}", file=sys.stderr, flush=True)
                failed = True
            finally:
                pair.stop()
    print(table(pairs))
    print(f"\n{conditions(args, load)}")
    if args.json:
        args.json.write_text(json.dumps({text: pair.seen for text, pair in pairs.items()}, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
