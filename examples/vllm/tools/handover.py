"""Where the time goes between a request and its first token from the decode engine: `compare.py --hand-over`.

A request is sent as a router sends it: to the prefill engine and then, with its answer, to the decode engine (`sequential`), or to
both at once (`overlap`). One request at a time, so each engine's events belong to it.
"""

import json
import secrets
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import servers
import stamps

# Tokens of an answer: the steps after the first one are decode steps.
ANSWER = 8
LIMIT = 600
# The most tokens that an engine computes in a step, and the longest prompt.
CHUNK = 1024
LONGEST = 8192

client = ThreadPoolExecutor(1)
Prompt = Callable[[int], list[int]]


@dataclass
class Times:
    """The stages of one request in seconds, from its sending."""

    queued: float
    first_chunk: float
    last_chunk: float
    loaded: float
    admitted: float
    first_token: float
    # A step of the decode engine with this request alone.
    step: float
    # When the client has the prefill engine's answer, and the first token of the decode engine.
    prefilled: float
    answered: float

    @property
    def hand_over(self) -> float:
        """From the prefill's last chunk to the decode engine's first token, less one decode step."""
        return self.first_token - self.last_chunk - self.step

    @property
    def beyond(self) -> float:
        """The time to the first token beyond the prefill's own time, in decode steps. The client measures both."""
        return (self.answered - self.prefilled) / self.step


class Pair:
    """A prefill and a decode server with one connector, and their events."""

    def __init__(self, name: str, model: str, logs: Path, tls: str | None) -> None:
        self.name = name
        ports = [servers.free_port() for _ in range(3)]
        self.bootstrap = f"http://127.0.0.1:{ports[2]}"
        path = stamps.plugin(logs / "stamps")
        self.events = [logs / f"{name}-{side}.stamps" for side in ("prefill", "decode")]
        argv = ["--max-num-batched-tokens", str(CHUNK), "--max-model-len", str(LONGEST + ANSWER)]
        argv += ["--hf-overrides", json.dumps({"max_position_embeddings": 2 * LONGEST})]

        def env(events: Path, port: int) -> dict[str, str]:
            events.touch()
            more = {"KVFERRY_STAMPS": str(events), "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}
            more["PYTHONPATH"] = servers.prepended(path)
            return more | ({"UCX_TLS": tls} if tls else {})

        def transfer(role: str) -> dict[str, Any]:
            if name == "kvferry":
                more = {"port": ports[0], "bootstrap_port": ports[2]} if role == "kv_producer" else {}
                return servers.kvferry_config(role, **more)
            return {"kv_connector": "NixlConnector", "kv_role": role, "kv_load_failure_policy": "recompute"}

        self.servers = [
            servers.vllm(f"{name}-{role}", model, logs, transfer(role), env(events, port), argv)
            for role, events, port in zip(("kv_producer", "kv_consumer"), self.events, ports[:2], strict=True)
        ]
        self.answers = self.wrong = 0

    def start(self) -> None:
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.healthy()

    def stop(self) -> None:
        for server in self.servers:
            server.kill()

    def request(self, prompt: list[int], overlap: bool) -> Times:
        """Sends one request, and checks its answer."""
        seen = [events.stat().st_size for events in self.events]
        decode = self.servers[1]
        began = time.monotonic()
        asked: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
        if overlap:
            asked["transfer_id"] = transfer = f"xfer-{secrets.token_hex(16)}"
            there = {"transfer_id": transfer, "remote_bootstrap_addr": self.bootstrap, "remote_engine_id": ""}
            params = {"do_remote_decode": False, "do_remote_prefill": True} | there
            prefilling = client.submit(self._prefill, prompt, asked)
        else:
            result, prefilled = self._prefill(prompt, asked)
            params = result["kv_transfer_params"]
        parts = []
        answered = 0.0
        for part in servers.stream(decode.url, prompt, ANSWER, LIMIT, kv_transfer_params=params, ignore_eos=True):
            answered = answered or time.monotonic()
            parts.append(part)
        if overlap:
            _, prefilled = prefilling.result()
        there, here = (self._new(events, at) for events, at in zip(self.events, seen, strict=True))
        alone = servers.complete(decode.url, prompt, ANSWER, LIMIT, cache_salt="alone", ignore_eos=True)
        self.answers += 1
        self.wrong += alone["choices"][0]["text"] != "".join(parts)
        return times(began, (prefilled, answered), there, here)

    def _prefill(self, prompt: list[int], params: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """The prefill engine's answer, and when it came."""
        answer = servers.complete(self.servers[0].url, prompt, 1, LIMIT, kv_transfer_params=params)
        return answer, time.monotonic()

    @staticmethod
    def _new(events: Path, at: int) -> list[tuple[str, float]]:
        """The events since an earlier size of their file."""
        with events.open() as lines:
            lines.seek(at)
            return [(e["event"], e["t"]) for e in map(json.loads, lines)]


def times(
    began: float, client: tuple[float, float], prefill: list[tuple[str, float]], decode: list[tuple[str, float]]
) -> Times:
    """The stages of a request by the events of both engines. `client`: when it had the answer of each. Raises `ValueError` if the
    prompt was not loaded."""

    def at(events: list[tuple[str, float]], event: str) -> list[float]:
        found = [t - began for name, t in events if name == event]
        if not found:
            raise ValueError(f"no event {event!r}: the prompt was not loaded")
        return found

    tokens = at(decode, "token")
    return Times(
        queued=at(prefill, "queued")[0],
        first_chunk=at(prefill, "scheduled")[0],
        last_chunk=at(prefill, "computed")[-1],
        loaded=at(decode, "loaded")[0],
        admitted=at(decode, "scheduled")[0],
        first_token=tokens[0],
        step=statistics.median(b - a for a, b in zip(tokens[:ANSWER], tokens[1:ANSWER], strict=False)),
        prefilled=client[0] - began,
        answered=client[1] - began,
    )


COLUMNS = ["queued", "first chunk", "last chunk computed", "last chunk loaded", "admitted", "first token", "hand-over less a step"]


def row(label: str, seen: list[Times]) -> str:
    """Medians, in milliseconds."""

    def middle(of: Callable[[Times], float]) -> str:
        return f"{1000 * statistics.median(map(of, seen)):.1f}"

    stages = [middle(lambda t, name=name: getattr(t, name)) for name in list(Times.__dataclass_fields__)[:6]]
    cells = [*stages, f"**{middle(lambda t: t.hand_over)}**", middle(lambda t: t.step)]
    cells += [middle(lambda t: t.prefilled), middle(lambda t: t.answered)]
    return f"| {label} | " + " | ".join(cells) + f" | {statistics.median(t.beyond for t in seen):.1f} |"


def table(seen: dict[tuple[str, int], list[Times]]) -> str:
    """A line for each way and length of the prompt, and the ratios of the hand-overs."""
    head = ["", *COLUMNS, "decode step", "prefill answered", "decode answered", "steps between them"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --: |" * (len(head) - 1)]
    lines += [row(f"{way}, {tokens:,} tokens ({len(seen[way, tokens])})", seen[way, tokens]) for way, tokens in sorted(seen, key=lambda k: k[::-1])]
    lengths = sorted({tokens for _, tokens in seen})
    for other in ("kvferry sequential", "NIXL connector"):
        for tokens in lengths:
            ours, theirs = seen.get(("kvferry overlap", tokens)), seen.get((other, tokens))
            if ours and theirs:
                a, b = (statistics.median(t.hand_over for t in ts) for ts in (ours, theirs))
                lines.append(f"\n{tokens:,} tokens: ratio of the hand-overs, kvferry overlap to {other}: {a / b:.2f}.")
    return "\n".join(lines)


def measure(
    names: list[str],
    make: Callable[[str], Pair],
    prompt: Prompt,
    lengths: list[int],
    requests: int,
    rounds: int,
    budget: float,
    say: Callable[[str], None],
) -> tuple[dict[tuple[str, int], list[Times]], dict[str, tuple[int, int]]]:
    """Measures each connector in each round, one pair of servers at a time, for `budget` seconds at most for each length. Returns
    the times by way and length, and the wrong answers and all answers by connector."""
    seen: dict[tuple[str, int], list[Times]] = {}
    answers = dict.fromkeys(names, (0, 0))
    for i in range(rounds):
        for name in names:
            ways = {"kvferry overlap": True, "kvferry sequential": False} if name == "kvferry" else {"NIXL connector": False}
            say(f"round {i + 1} of {rounds}: {name}")
            pair = make(name)
            try:
                pair.start()
                for overlap in ways.values():
                    pair.request(prompt(lengths[0]), overlap)
                for tokens in lengths:
                    until = time.monotonic() + budget / rounds
                    for _ in range(requests * (i + 1) // rounds - requests * i // rounds):
                        if time.monotonic() > until:
                            say(f"{name}, {tokens} tokens: the time budget is used up")
                            break
                        for way, overlap in ways.items():
                            times = pair.request(prompt(tokens), overlap)
                            say(f"{way} {tokens} {json.dumps({k: round(v, 5) for k, v in vars(times).items()})}")
                            seen.setdefault((way, tokens), []).append(times)
            finally:
                pair.stop()
            answers[name] = (answers[name][0] + pair.wrong, answers[name][1] + pair.answers)
    return seen, answers
