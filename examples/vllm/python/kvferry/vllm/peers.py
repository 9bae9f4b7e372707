"""Prefill engines that this engine knows from their bootstrap endpoints.

Threads query the endpoints, so the scheduler never waits for an answer. An endpoint's address comes with a request, from
outside: only hosts that `dial` lists are queried, and size, time and number of answers are bounded.
"""

import ipaddress
import json
import socket
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kvferry import _native
from kvferry.vllm import params as kv_params
from kvferry.vllm.bootstrap import OVERLAP

# Longest time for one answer, and its largest size: 1,024 ranks, the most that a name has, take 120 KiB.
ANSWER_SECONDS = 2.0
ANSWER_BYTES = 256 << 10
# Endpoints that are remembered, and queries at a time.
REMEMBERED = 256
QUESTIONS = 8
# How long a request waits for an answer, and the time after which a query that still runs (the look-up of a host's name has no
# limit) counts no longer towards `QUESTIONS`, but towards these threads.
ASK_SECONDS = 2 * ANSWER_SECONDS
THREADS = 64
# A known answer is used at once. When it is older than this, in seconds, the endpoint is queried again in the background, so a
# restart of the engine is noticed even if no load has failed.
FRESH = 1.0
# After a failure, requests wait for another answer only if the failure came within this time, in seconds: a dead host must not
# delay each request.
QUICK = 0.25


class Asking(Exception):
    """The answer is not there yet."""


@dataclass(frozen=True)
class Peer:
    """A prefill engine."""

    engine: str
    incarnation: str
    ranks: list[tuple[int, str, str]]


@dataclass
class Entry:
    """The state of one endpoint."""

    # When it was first looked up, and last queried, and whether that query still runs. Times of `time.monotonic`.
    made: float
    asked: float = 0.0
    running: bool = False
    # When it last answered, or failed; 0: never.
    answered: float = 0.0
    peers: list[Peer] = field(default_factory=list)
    # Why there are no peers; empty: there are, or it is not known.
    why: str = ""


class Peers:
    """The endpoints that were queried."""

    def __init__(self, seal_keys: list[bytes], dial: tuple[str, ...] = ()) -> None:
        self._seal_keys, self._dial = seal_keys, dial
        # By host and port, the one that was used last at the end.
        self._entries: OrderedDict[tuple[str, int], Entry] = OrderedDict()
        self._changed = threading.Condition()
        # When each running query has begun.
        self._queries: list[float] = []

    def get(self, bootstrap: str, engine: str | None) -> Peer:
        """The engine behind an endpoint. Raises `Asking`, or `NoPeer`."""
        key = host, _ = _endpoint(bootstrap)
        if not allows(self._dial, host):
            raise kv_params.NoPeer(bootstrap, "the setting `dial` does not list its host")
        now = time.monotonic()
        with self._changed:
            entry = self._entries.get(key)
            if entry is None:
                self._make_room(bootstrap, now)
                entry = self._entries[key] = Entry(now)
            self._entries.move_to_end(key)
            if not entry.running and now > entry.answered + FRESH:
                took = entry.answered - entry.asked
                if self._ask(key, entry, now) and not entry.peers and took < QUICK:
                    entry.answered, entry.why = 0.0, ""
            if not entry.answered:
                if entry.running and now > entry.asked + ASK_SECONDS:
                    raise kv_params.NoPeer(bootstrap, f"no answer within {ASK_SECONDS:.0f} s")
                raise Asking
            if entry.why:
                raise kv_params.NoPeer(bootstrap, entry.why)
            return _choose(bootstrap, entry.peers, engine)

    def _make_room(self, bootstrap: str, now: float) -> None:
        """Forgets the endpoint that was not used for longest. Requests still wait for the answers of new ones."""
        if len(self._entries) < REMEMBERED:
            return
        oldest = next((k for k, e in self._entries.items() if e.answered or now > e.made + ASK_SECONDS), None)
        if oldest is None:
            raise kv_params.NoPeer(bootstrap, f"{REMEMBERED} other endpoints are queried")
        del self._entries[oldest]

    def forget(self, engine: str) -> None:
        """A load from this engine failed: it may have restarted, so its endpoint is queried again before the next load."""
        with self._changed:
            for key in [k for k, e in self._entries.items() if any(p.engine == engine for p in e.peers)]:
                del self._entries[key]

    def wait(self, seconds: float) -> None:
        """Waits for an answer, if one is outstanding."""
        with self._changed:
            if self._queries:
                self._changed.wait(seconds)

    def _ask(self, key: tuple[str, int], entry: Entry, now: float) -> bool:
        """Starts a query. `False`: too many run, so this one waits for a later look-up."""
        if sum(now < t + ASK_SECONDS for t in self._queries) >= QUESTIONS or len(self._queries) >= THREADS:
            return False
        thread = threading.Thread(target=self._query, args=(key, entry, now), name="kvferry-peers", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        entry.running, entry.asked = True, now
        self._queries.append(now)
        return True

    def _query(self, key: tuple[str, int], entry: Entry, started: float) -> None:
        peers: list[Peer] = []
        why = ""
        try:
            peers = read(fetch(*key, "/query"), self._seal_keys)
        except Exception as e:
            why = f"{type(e).__name__}: {e}"[:300] if not isinstance(e, ValueError) else str(e)[:300]
        with self._changed:
            self._queries.remove(started)
            entry.running, entry.answered, entry.peers, entry.why = False, time.monotonic(), peers, why
            self._changed.notify_all()


def _endpoint(bootstrap: str) -> tuple[str, int]:
    if len(bootstrap) > 256 or not bootstrap.isascii() or not bootstrap.isprintable() or " " in bootstrap:
        raise kv_params.BadParams("remote_bootstrap_addr is not http://HOST:PORT")
    try:
        url = urlsplit(bootstrap)
        host, port = url.hostname, url.port
    except ValueError:
        host, port, url = None, None, None
    bare = url is not None and url.path in ("", "/") and not url.query and not url.fragment and url.username is None
    if url is None or url.scheme != "http" or not host or not bare:
        raise kv_params.BadParams("remote_bootstrap_addr is not http://HOST:PORT")
    return host, port or 80


def fetch(host: str, port: int, path: str) -> bytes:
    """The body of a GET, within the bounds. Raises `OSError` or `ValueError`."""
    until = time.monotonic() + ANSWER_SECONDS
    request = f"GET {path} HTTP/1.0\r\nHost: {host}:{port}\r\nAccept: application/json\r\n\r\n"
    answer, head, length = bytearray(), b"", None
    # Not http.client: its limits are per line and per read, so a slow endpoint could take hours.
    with _connect(host, port, until) as s:
        s.sendall(request.encode("ascii"))
        while length is None or len(answer) < length:
            s.settimeout(max(until - time.monotonic(), 0.001))
            part = s.recv(65536)
            if not part:
                break
            answer += part
            if not head and (end := answer.find(b"\r\n\r\n")) >= 0:
                head = bytes(answer[:end])
                del answer[: end + 4]
                length = _length(head)
            if len(answer) > ANSWER_BYTES:
                raise ValueError(f"its bootstrap answer has more than {ANSWER_BYTES} bytes")
    status = head.split(b"\r\n", 1)[0].split(b" ")
    if not status[0].startswith(b"HTTP/1.") or len(status) < 2:
        raise ValueError("its bootstrap endpoint does not speak HTTP")
    if status[1] != b"200":
        raise ValueError(f"its bootstrap endpoint answered {status[1].decode('ascii', 'replace')[:16]}")
    return bytes(answer)


def _connect(host: str, port: int, until: float) -> socket.socket:
    """Connects to the first address of a host that answers in time."""
    failed: OSError = TimeoutError("timed out")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        s = socket.socket(family, kind, protocol)
        try:
            s.settimeout(max(until - time.monotonic(), 0.001))
            s.connect(address)
            return s
        except OSError as e:
            s.close()
            failed = e
    raise failed


def _length(head: bytes) -> int | None:
    """The length of the body, from a complete head."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return int(value)
    return None


def read(body: bytes, seal_keys: list[bytes]) -> list[Peer]:
    """The prefill engines in an answer, which is untrusted input. Raises `ValueError`."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise ValueError("its bootstrap answer is not JSON") from e
    if not isinstance(answer, dict):
        raise ValueError("its bootstrap answer is not an object")
    peers = []
    for entry in answer.values():
        ours = entry.get("kvferry") if isinstance(entry, dict) else None
        if not isinstance(ours, dict) or ours.get("overlap") != OVERLAP or not isinstance(ours.get("name"), dict):
            continue
        name: dict[str, Any] = ours["name"]
        try:
            _native.check_offer(json.dumps(name), seal_keys)
        except ValueError as e:
            raise ValueError(f"its bootstrap answer is unusable: {e}") from e
        ranks = [(r["rank"], r["incarnation"], r["addr"]) for r in name["ranks"]]
        peers.append(Peer(name["engine"], name["incarnation"], ranks))
    if not peers:
        raise ValueError("it does not offer prompts that it still computes")
    return peers


def _choose(bootstrap: str, peers: list[Peer], engine: str | None) -> Peer:
    for peer in peers:
        if peer.engine == engine:
            return peer
    # A router may know the engine's id from before a restart.
    if len(peers) == 1:
        return peers[0]
    raise kv_params.NoPeer(bootstrap, "none of its replicas has the engine id of the request")


def allows(dial: tuple[str, ...], host: str) -> bool:
    """Whether the setting `dial` lists a host. The native part checks the addresses of ranks in the same way."""
    if not dial:
        return True
    address = _address(host)
    if address is None:
        name = host.rstrip(".").lower()
        # A name that ends in a number is an address in an old form, such as 127.1.
        if name.rsplit(".", 1)[-1].isdigit():
            return False
        names = [d.lower() for d in dial]
        return name in names or any(n.startswith(".") and name.endswith(n) and len(name) > len(n) for n in names)
    for entry in dial:
        try:
            if address in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False


def _address(host: str) -> "ipaddress.IPv4Address | ipaddress.IPv6Address | None":
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
    # An IPv4-mapped IPv6 address is the same host.
    return getattr(address, "ipv4_mapped", None) or address
