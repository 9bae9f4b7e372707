"""Starts vLLM's HTTP servers and the router as processes."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# For engines on a small machine without a GPU; no access to the network.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}


def free_port() -> int:
    """A port that is free, and that the system gives to no other process by itself until it is used."""
    # Below the ports of outgoing connections, see net.ipv4.ip_local_port_range.
    for port in random.sample(range(20_000, 32_000), 1000):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port between 20000 and 32000 is free")


def kvferry_config(role: str, **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "KvFerryConnector",
        "kv_connector_module_path": "kvferry.vllm",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


class Process:
    """A server process; its output goes to a file."""

    def __init__(self, name: str, argv: list[str], port: int, logs: Path, env: dict[str, str] | None = None) -> None:
        self.name, self.argv = name, argv
        self.env = {**os.environ, **ENVIRONMENT, **(env or {})}
        self.log = logs / f"{name}.log"
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Process":
        with self.log.open("ab") as log:
            # A session of its own: `kill` must reach the engine and its children at the same time, as the loss of a
            # machine does.
            self.process = subprocess.Popen(
                self.argv, stdout=log, stderr=log, env=self.env, start_new_session=True, stdin=subprocess.DEVNULL
            )
        return self

    def healthy(self, limit: float = 300) -> "Process":
        until = time.monotonic() + limit
        while time.monotonic() < until:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} has exited:\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise RuntimeError(f"{self.name} is not healthy after {limit} s:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """Sends SIGKILL to the process and its children."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()

    def stop(self, limit: float = 20) -> None:
        """Sends SIGTERM, and after `limit` seconds SIGKILL."""
        if self.process is None or self.process.poll() is not None:
            return self.kill()
        self.process.terminate()
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def cpu_seconds(self) -> float:
        """CPU time of the process and its children."""
        import psutil

        assert self.process is not None
        root = psutil.Process(self.process.pid)
        times = [p.cpu_times() for p in [root, *root.children(recursive=True)]]
        return sum(t.user + t.system for t in times)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as r:
            return r.read().decode()


def vllm(
    name: str,
    model: str,
    logs: Path,
    transfer: dict[str, Any] | None,
    env: dict[str, str] | None = None,
    more: list[str] | None = None,
) -> Process:
    """A vLLM server. With the package `vllm`, `vllm serve` starts the same server."""
    port = free_port()
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "model"]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    argv += ["--max-model-len", "2048", "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(256 << 20)]
    if transfer:
        argv += ["--kv-transfer-config", json.dumps(transfer)]
    # The last value of an option counts.
    return Process(name, argv + (more or []), port, logs, env)


def prepended(directory: str) -> str:
    """PYTHONPATH with a directory in front."""
    return os.pathsep.join([directory, *filter(None, [os.environ.get("PYTHONPATH")])])


def _engines(prefill: list[str], decode: list[str]) -> list[str]:
    argv = [a for engine in prefill for a in ("--prefill", *engine.split())]
    return argv + [a for engine in decode for a in ("--decode", *engine.split())]


def router(prefill: list[str], decode: list[str], logs: Path, *more: str) -> Process:
    """The router of this directory. An engine is `URL`, or `URL BOOTSTRAP_PORT`."""
    port = free_port()
    argv = [sys.executable, str(HERE / "router.py"), "--port", str(port), *_engines(prefill, decode), *more]
    return Process("router" + "".join(more), argv, port, logs)


def vllm_router(prefill: list[str], decode: list[str], logs: Path, connector: str) -> Process:
    """The package `vllm-router` in the mode for a connector: `nixl` or `mooncake`."""
    port = free_port()
    argv = [str(Path(sys.executable).parent / "vllm-router"), "--vllm-pd-disaggregation", "--kv-connector", connector]
    argv += ["--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port), *_engines(prefill, decode)]
    argv += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    return Process(f"vllm-router-{connector}", argv, port, logs)


def ask(url: str, prompt: Any, max_tokens: int, limit: float, **more: Any) -> Any:
    """Sends a request for a greedy completion. Returns the open answer."""
    body = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=limit)


def complete(url: str, prompt: Any, max_tokens: int = 16, limit: float = 300, **more: Any) -> dict[str, Any]:
    """Requests one greedy completion."""
    with ask(url, prompt, max_tokens, limit, **more) as r:
        return json.loads(r.read())


def stream(url: str, prompt: Any, max_tokens: int = 16, limit: float = 300, **more: Any) -> Iterator[str]:
    """Requests one greedy completion, and yields its parts as they arrive."""
    with ask(url, prompt, max_tokens, limit, stream=True, **more) as r:
        for line in r:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                yield json.loads(data)["choices"][0]["text"]
