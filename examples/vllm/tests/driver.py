"""Handles for the engine processes of `engine.py`."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Longest wait in seconds for any event. Generous, because test machines are busy.
LIMIT = float(os.environ.get("KVFERRY_TEST_LIMIT", "180"))


class Dead(AssertionError):
    """The engine process has exited."""


class Nursery:
    """The process that forks engines: see `engine.py`."""

    def __init__(self, log: Path) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "engine.py")], stdin=theirs, stdout=out, stderr=out
            )
        theirs.close()
        self._socket.settimeout(LIMIT)
        self._ready = False

    def engine(self, spec: dict[str, Any], fds: list[int]) -> int:
        """Starts an engine and returns its process id; `fds` are its standard input, output and error."""
        if not self._ready:
            assert self._socket.recv(16) == b"ready", "vLLM cannot be imported: see the nursery's log"
            self._ready = True
        socket.send_fds(self._socket, [json.dumps(spec).encode()], fds)
        return int(self._socket.recv(16))

    def close(self) -> None:
        self._socket.close()
        self._process.wait(LIMIT)


class Engine:
    """One engine process."""

    def __init__(self, name: str, spec: dict[str, Any], log_dir: Path, nursery: Nursery) -> None:
        self.name = name
        self.log = log_dir / f"{name}.log"
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._kept: list[dict[str, Any]] = []
        self._ready = False
        commands, self._stdin = os.pipe()
        stdout, events = os.pipe()
        with self.log.open("wb") as log:
            self._pid = nursery.engine(spec, [commands, events, log.fileno()])
        os.close(commands)
        os.close(events)
        self._ended = threading.Event()
        threading.Thread(target=self._read, args=(stdout,), daemon=True).start()

    def _read(self, stdout: int) -> None:
        with os.fdopen(stdout) as lines:
            for line in lines:
                self._events.put(json.loads(line))
        self._ended.set()
        self._events.put(None)

    def send(self, **command: Any) -> None:
        try:
            os.write(self._stdin, json.dumps(command).encode() + b"\n")
        except BrokenPipeError as e:
            raise Dead(self.tail()) from e

    def wait(self, event: str, id: str | None = None, limit: float = LIMIT) -> dict[str, Any]:
        """Waits for the next event of this kind (and request)."""

        def fits(e: dict[str, Any]) -> bool:
            return e["event"] == event and (id is None or e.get("id") == id)

        for i, e in enumerate(self._kept):
            if fits(e):
                return self._kept.pop(i)
        until = time.monotonic() + limit
        while True:
            try:
                e = self._events.get(timeout=max(until - time.monotonic(), 0.001))
            except queue.Empty:
                raise AssertionError(f"{self.name}: no {event} {id or ''} within {limit} s\n{self.tail()}") from None
            if e is None:
                self._events.put(None)
                raise Dead(f"{self.name} has exited\n{self.tail()}")
            if fits(e):
                return e
            self._kept.append(e)

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def ready(self) -> "Engine":
        if not self._ready:
            self.wait("ready")
            self._ready = True
        return self

    def add(self, id: str, tokens: list[int], **more: Any) -> None:
        self.send(op="add", id=id, tokens=tokens, **more)

    def generate(self, id: str, tokens: list[int], **more: Any) -> dict[str, Any]:
        self.add(id, tokens, **more)
        return self.wait("done", id)

    def prefill(self, id: str, tokens: list[int], **more: Any) -> dict[str, Any]:
        """Prefills a prompt and returns the params for the decode side."""
        done = self.generate(id, tokens, max_tokens=1, params=PREFILL, **more)
        assert done["params"], self.tail()
        return done["params"]

    def pause(self, id: str, at: int) -> None:
        """The engine will stop after the step that schedules this request's `at`-th token; then it sends `paused`."""
        self.send(op="pause", id=id, at=at)

    def resume(self) -> None:
        self.send(op="pause")

    def state(self) -> dict[str, Any]:
        self.send(op="state")
        return self.wait("state")

    def python(self, expr: str) -> Any:
        self.send(op="python", expr=expr)
        return self.wait("value")["value"]

    def metrics(self) -> dict[str, float]:
        """The metrics by name, with all labels but vLLM's own: `kvferry_loads{result=partial}`."""
        self.send(op="metrics")
        found: dict[str, float] = {}
        for m in self.wait("metrics")["values"]:
            labels = [f"{k}={v}" for k, v in m["labels"].items() if k not in ("model_name", "engine")]
            name = m["name"].removeprefix("vllm:") + (f"{{{','.join(labels)}}}" if labels else "")
            found[name] = found.get(name, 0) + (m["value"] or 0)
        return found

    def settled(self, limit: float = LIMIT) -> dict[str, Any]:
        """Waits until the engine has no request, and returns its state."""
        until = time.monotonic() + limit
        while True:
            state = self.state()
            if state["requests"] == 0 and not state["busy"]:
                return state
            assert time.monotonic() < until, f"{self.name} still has {state}\n{self.tail()}"
            time.sleep(0.05)

    def kill(self) -> None:
        """Sends SIGKILL and waits for the end of the process."""
        self._signal()
        assert self._ended.wait(LIMIT)

    def _signal(self) -> None:
        try:
            # The ranks of an engine are in its process group.
            os.killpg(self._pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        if not self._ended.is_set():
            self._signal()
            self._ended.wait(LIMIT)
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1


# The params that routers send to a prefill engine.
PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
