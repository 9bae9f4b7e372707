"""The bootstrap endpoint, and what is made of its answers, which are untrusted input."""

import json
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kvferry.vllm import bootstrap, peers
from kvferry.vllm.params import BadParams, NoPeer
from kvferry.vllm.peers import Asking, Peer, Peers

KEYS = [b"5" * 64]
RANKS = [(0, "00000000000000aa", "127.0.0.1:7400"), (1, "00000000000000ab", "127.0.0.1:7401")]
LIMIT = 30


def entry(keys: list[bytes] = [], engine: str = "prefill-0", **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"incarnation": "00000000000000cc", "ranks": RANKS, "pulls": False} | more
    return bootstrap.entry(engine=engine, seal_keys=keys, **given)


@pytest.fixture
def server() -> Iterator[bootstrap.Server]:
    server = bootstrap.Server("127.0.0.1", 0, 0)
    server.set(entry())
    yield server
    server.close()


def url(server: bootstrap.Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def answered(peers: Peers, address: str, engine: str | None = None) -> Peer:
    """The engine, once its endpoint has answered."""
    until = time.monotonic() + LIMIT
    while True:
        try:
            return peers.get(address, engine)
        except Asking:
            assert time.monotonic() < until
            peers.wait(0.1)


def why_not(address: str, **more: Any) -> str:
    with pytest.raises(NoPeer) as refused:
        answered(Peers(more.pop("keys", []), **more), address)
    return refused.value.key[1]


def test_an_engine_is_known_after_its_endpoint_has_answered(server: bootstrap.Server) -> None:
    known = Peers([])
    with pytest.raises(Asking):
        known.get(url(server), None)
    assert answered(known, url(server)) == Peer("prefill-0", "00000000000000cc", RANKS)
    # What a router reads.
    answer = json.loads(peers.fetch("127.0.0.1", server.port, "/query"))
    assert answer["0"]["engine_id"] == "prefill-0" and answer["0"]["kvferry"]["pulls"] is False


def test_a_restarted_engine_is_asked_again(server: bootstrap.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Peers([])
    answered(known, url(server))
    server.set(entry(engine="prefill-1"))
    # A load from it has failed.
    known.forget("prefill-0")
    assert answered(known, url(server)).engine == "prefill-1"
    # No load has failed: the old answer is used until the new one is there.
    server.set(entry(engine="prefill-2"))
    monkeypatch.setattr(peers, "FRESH", 0.0)
    assert known.get(url(server), None).engine == "prefill-1"
    until = time.monotonic() + LIMIT
    while known.get(url(server), None).engine != "prefill-2":
        assert time.monotonic() < until


def test_an_engine_that_is_down_is_asked_again_without_delay(
    server: bootstrap.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, address = Peers([]), url(server)
    server.close()
    until = time.monotonic() + LIMIT
    while True:
        try:
            socket.create_connection(("127.0.0.1", server.port), 1).close()
        except ConnectionRefusedError:
            break
        assert time.monotonic() < until
    with pytest.raises(NoPeer, match="ConnectionRefused"):
        answered(known, address)
    with pytest.raises(NoPeer):
        known.get(address, None)
    monkeypatch.setattr(peers, "FRESH", 0.0)
    again = bootstrap.Server("127.0.0.1", server.port, 0)
    again.set(entry())
    assert answered(known, address).engine == "prefill-0"
    again.close()


def test_one_of_several_replicas_is_chosen_by_its_engine_id() -> None:
    answer = {"0": entry(engine="zero"), "1": entry(engine="one")}
    found = peers.read(json.dumps(answer).encode(), [])
    assert peers._choose("x", found, "one").engine == "one"
    with pytest.raises(NoPeer):
        peers._choose("x", found, "three")
    # A router may know the id from before a restart.
    assert peers._choose("x", found[:1], "three").engine == "zero"


def edited(**changes: Any) -> dict[str, Any]:
    made = entry(KEYS)
    made["kvferry"]["name"] |= changes
    return made


UNUSABLE = {
    "no JSON": b"<html>",
    "no object": b"[]",
    "deep": b"[" * 100_000,
    "no engine": b"{}",
    "another connector": {"0": {"engine_id": "x", "worker_addr": {}}},
    "a newer version": {"0": {"engine_id": "x", "kvferry": {"overlap": 2, "name": {}}}},
    "an engine that offers nothing": {"0": entry(KEYS, incarnation=None)},
    "no name": {"0": {"engine_id": "x", "kvferry": {"overlap": 1, "name": []}}},
    "an empty name": {"0": {"engine_id": "x", "kvferry": {"overlap": 1, "name": {}}}},
    "an edited address": {"0": edited(ranks=[{"rank": 0, "incarnation": "00000000000000aa", "addr": "198.51.100.7:1"}])},
    "another engine": {"0": edited(engine="other")},
    "no seal": {"0": entry()},
}


@pytest.mark.parametrize("answer", UNUSABLE)
def test_an_unusable_answer_names_no_engine(answer: str) -> None:
    body = UNUSABLE[answer]
    with pytest.raises(ValueError):
        peers.read(body if isinstance(body, bytes) else json.dumps(body).encode(), KEYS)


def test_a_sealed_answer_is_believed_by_engines_with_the_key() -> None:
    body = json.dumps({"0": entry(KEYS)}).encode()
    assert peers.read(body, KEYS)[0].engine == "prefill-0"
    assert peers.read(body, [])[0].engine == "prefill-0"
    with pytest.raises(ValueError):
        peers.read(body, [b"6" * 64])


def raw(answer: bytes, pause: float = 0.0) -> Iterator[str]:
    """An endpoint that answers anything with these bytes, one by one with a pause between them."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            try:
                if not pause:
                    self.request.sendall(answer)
                for byte in answer if pause else b"":
                    self.request.sendall(bytes([byte]))
                    time.sleep(pause)
            except OSError:
                pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
HOSTILE = {
    "too long": (HEAD % (1 << 20) + b" " * (1 << 20), 0.0, "bytes"),
    "slow": (HEAD % 100 + b"{" * 100, 0.05, "timed out"),
    "another status": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 0.0, "404"),
    "a redirection": (b"HTTP/1.1 302 Found\r\nLocation: http://198.51.100.7/\r\nContent-Length: 0\r\n\r\n", 0.0, "302"),
    "no HTTP": (b"SSH-2.0-x\r\n", 0.0, "does not speak HTTP"),
    "nothing": (b"", 0.0, "does not speak HTTP"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_endpoint_costs_a_bounded_time_and_size(kind: str) -> None:
    answer, pause, why = HOSTILE[kind]
    for address in raw(answer, pause):
        assert why in why_not(address)


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:1", "ftp://127.0.0.1:1", "http://", "http://user@127.0.0.1:1", "http://127.0.0.1:99999", "http://[::1",
     "http://127.0.0.1:1/x"]
)
def test_only_addresses_of_http_are_asked(address: str) -> None:
    with pytest.raises(BadParams):
        Peers([]).get(address, None)


def test_only_listed_hosts_are_asked(server: bootstrap.Server) -> None:
    assert "`dial`" in why_not(url(server), dial=("10.0.0.0/8",))
    assert answered(Peers([], dial=("127.0.0.0/8",)), url(server)).engine == "prefill-0"
    # The examples of the native part.
    listed = ("10.1.0.0/16", "192.0.2.7", "fd00::/8", "Prefill-0", ".pods.example")
    for yes in ("10.1.255.3", "192.0.2.7", "fd12::1", "::ffff:10.1.2.3", "prefill-0", "PREFILL-0.", "a.b.pods.example."):
        assert peers.allows(listed, yes), yes
    for no in ("10.2.0.1", "192.0.2.8", "fe80::1", "prefill-1", "pods.example", "xpods.example", "10.1", "0x0a010001.1"):
        assert not peers.allows(listed, no), no


def test_the_endpoint_answers_one_question_and_survives_other_clients(server: bootstrap.Server) -> None:
    def told(request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), LIMIT) as s:
            try:
                s.sendall(request)
                return b"".join(iter(lambda: s.recv(65536), b""))
            except ConnectionError:
                return b""

    assert told(b"GET /query HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
    for other in (b"GET / HTTP/1.1\r\n\r\n", b"POST /query HTTP/1.1\r\n\r\n", b"\r\n\r\n"):
        assert told(other).startswith(b"HTTP/1.1 404")
    # A request without an end, which is too long; and clients that say nothing, as many as are served at once.
    assert told(b"GET /query" * 2000) == b""
    silent = [socket.create_connection(("127.0.0.1", server.port), LIMIT) for _ in range(bootstrap.CONNECTIONS)]
    until = time.monotonic() + LIMIT
    while not told(b"GET /query HTTP/1.1\r\n\r\n"):
        assert time.monotonic() < until
    for s in silent:
        s.close()


def test_the_number_of_known_endpoints_is_bounded_and_no_waiting_request_loses_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Peers, "_query", lambda self, *_: None)
    known = Peers([])

    def get(port: int) -> None:
        known.get(f"http://127.0.0.1:{port}", None)

    for port in range(1, 1 + peers.REMEMBERED):
        with pytest.raises(Asking):
            get(port)
    assert len(known._queries) == peers.QUESTIONS
    # All of them still wait, so another one is refused, and none of them is forgotten.
    with pytest.raises(NoPeer, match="other endpoints"):
        get(1000)
    assert list(known._entries) == [("127.0.0.1", port) for port in range(1, 1 + peers.REMEMBERED)]
    # Their requests have given up.
    now[0] += peers.ASK_SECONDS + 1
    with pytest.raises(Asking):
        get(1000)
    assert len(known._entries) == peers.REMEMBERED and ("127.0.0.1", 1) not in known._entries
    # Queries that never end leave room for others, and are bounded.
    for _ in range(20):
        now[0] += peers.ASK_SECONDS + 1
        for port in range(2000, 2000 + peers.QUESTIONS):
            with pytest.raises((Asking, NoPeer)):
                get(port + int(now[0]))
    assert len(known._queries) == peers.THREADS


def test_a_request_waits_for_an_endpoint_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvferry.vllm import remotes
    from kvferry.vllm.repeats import Repeats
    from kvferry.vllm.stats import KvFerryStats

    now = [100.0]
    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])
    # Its query does not even begin.
    monkeypatch.setattr(Peers, "_ask", lambda self, *_: False)
    it = remotes.Remotes([], Peers([]), KvFerryStats(), Repeats(), lambda _: {}, lambda _: None)
    params = {"do_remote_prefill": True, "transfer_id": "x" * 32, "remote_bootstrap_addr": "http://127.0.0.1:9"}
    request = SimpleNamespace(request_id="r", kv_transfer_params=params)
    for _ in range(2):
        with pytest.raises(Asking):
            it.get(request)  # type: ignore[arg-type]
        now[0] += peers.ASK_SECONDS - 0.5
    assert it.get(request) is None and not params["do_remote_prefill"]  # type: ignore[arg-type]
    assert it._asked == {}


def test_engines_with_seal_keys_overlap(tmp_path: Path) -> None:
    """The name that both derive is sealed by each with the shared key."""
    from kvferry import _native
    from kvferry.vllm import params

    (peer,) = peers.read(json.dumps({"0": entry(KEYS)}).encode(), KEYS)
    same = dict(request="r", tokens=40, fingerprints={"prompt": "ab"}, seal_keys=KEYS)
    here = params.minted("x" * 32, engine=peer.engine, incarnation=peer.incarnation, ranks=peer.ranks, **same)
    there = params.minted("x" * 32, engine="prefill-0", incarnation="00000000000000cc", ranks=RANKS, **same)
    assert here == there and here[0] == _native.transfer_offer("x" * 32)
    _native.check_offer(here[1], KEYS)
    other, _ = params.minted("y" * 32, engine="prefill-0", incarnation="00000000000000cc", ranks=RANKS, **same)
    assert other != here[0]
