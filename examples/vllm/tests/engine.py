"""The nursery: imports vLLM, which is most of an engine's start, and then forks one process per engine. A test run has one
nursery, and an engine starts within two seconds instead of ten.

An engine reads commands as lines of JSON from standard input, and writes events as lines of JSON to standard output. Its loop
is a server's: it steps while the engine has work, and reads commands between steps.
"""

import json
import multiprocessing
import os
import re
import select
import signal
import socket
import time
import traceback
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

# vLLM's ranks wait for work in a loop of sched_yield. Some kernels move a yielding thread ahead in virtual time (Linux 6.18
# and 6.12.63: commit 79104becf42b; fixed by 1319ea57529e). There, two such threads on two processors keep everything else on
# the host from running for 15 s and more. Ranks are forked from this process, so the replacement holds for them too.
os.sched_yield = lambda: time.sleep(0.0005)

events: Any = None


def open_events() -> None:
    """Gives the events a descriptor of their own. The engine's own standard output goes to standard error."""
    global events
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)


def emit(**event: Any) -> None:
    events.write(json.dumps(event) + "\n")


class Engine:
    def __init__(self, spec: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        more: dict[str, Any] = dict(spec.get("llm", {}))
        if spec.get("transfer"):
            more["kv_transfer_config"] = KVTransferConfig(**spec["transfer"])
        llm = LLM(
            model=spec["model"],
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            seed=0,
            disable_log_stats=False,
            kv_cache_memory_bytes=spec.get("cache", 64 << 20),
            **{"max_model_len": 2048, "max_num_seqs": 64, "max_num_batched_tokens": 2048} | more,
        )
        self.llm = llm
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.connector = self.scheduler.get_kv_connector()
        self.scheduled: dict[str, int] = {}
        self.idle = False
        # Blocks that the offer of a request leaves out: lists of (group, position).
        self.lost: dict[str, list[list[int]]] = {}
        # The engine makes no step once this many tokens of a request were scheduled: `(request, tokens)`.
        self.pause: tuple[str, int] | None = None
        self._watch()
        self._leave_out()

    def _watch(self) -> None:
        """Counts the tokens that the scheduler has scheduled, by request."""
        schedule = self.scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.idle = not output.num_scheduled_tokens
            for request, n in output.num_scheduled_tokens.items():
                self.scheduled[request] = self.scheduled.get(request, 0) + n
            return output

        self.scheduler.schedule = watched

    def _leave_out(self) -> None:
        """Leaves the blocks in `lost` out of a request's offer, as if they had been freed before the offer was made."""
        connectors = [self.connector, *getattr(self.connector, "_connectors", [])]
        side = next((c._side for c in connectors if getattr(c, "_side", None) is not None), None)
        if side is None:
            return
        offer = side._offer

        def leaving_out(request: Any, blocks: Any, *more: Any) -> Any:
            made = offer(request, blocks, *more)
            # The engine appends eight random digits to a request's id.
            lost = self.lost.pop(request.request_id, None) or self.lost.pop(request.request_id[:-9], None)
            for group, position in lost or ():
                side._todo.offerings[-1].groups[group].blocks[position] = None
            return made

        side._offer = leaving_out

    def total(self, id: str) -> int:
        """The scheduled tokens of a request. The engine appends eight random digits to its id."""
        mine = re.compile(f"{re.escape(id)}(-[0-9a-f]{{8}})?")
        return sum(n for r, n in self.scheduled.items() if mine.fullmatch(r))

    def paused(self) -> bool:
        """Whether the engine makes no step. Its connector goes on."""
        return self.pause is not None and self.total(self.pause[0]) >= self.pause[1]

    def worker(self) -> Any:
        """kvferry's worker side, if it is in this process."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    def busy(self) -> bool:
        return self.engine.has_unfinished_requests() or self.scheduler.has_requests()

    def step(self) -> None:
        for out in self.engine.step():
            if out.finished:
                tokens = list(out.outputs[0].token_ids)
                total = self.total(out.request_id)
                emit(
                    event="done",
                    id=out.request_id,
                    tokens=tokens,
                    reason=out.outputs[0].finish_reason,
                    params=out.kv_transfer_params,
                    # Scheduled tokens after the first output token are not prompt tokens.
                    computed=total - max(len(tokens) - 1, 0),
                    prompt=len(out.prompt_token_ids or ()),
                )

    def command(self, c: dict[str, Any]) -> None:
        from vllm import SamplingParams

        op = c["op"]
        if op == "add":
            if c.get("lost"):
                self.lost[c["id"]] = c["lost"]
            extra = {"kv_transfer_params": c["params"]} if c.get("params") else None
            # Greedy. Several answers to one prompt must be sampled; top_k=1 makes sampling greedy.
            n = c.get("n", 1)
            greedy: dict[str, Any] = {"temperature": 0} if n == 1 else {"temperature": 1, "top_k": 1}
            sampling = SamplingParams(
                **greedy, max_tokens=c.get("max_tokens", 16), ignore_eos=True, extra_args=extra, n=n
            )
            lora = None
            if c.get("lora"):
                from vllm.lora.request import LoRARequest

                lora = LoRARequest(**c["lora"])
            prompt: dict[str, Any] = {"prompt_token_ids": c["tokens"]}
            if c.get("salt"):
                prompt["cache_salt"] = c["salt"]
            self.engine.add_request(c["id"], prompt, sampling, lora_request=lora)
        elif op == "abort":
            self.engine.abort_request([c["id"]])
            emit(event="aborted", id=c["id"])
        elif op == "pause":
            self.pause = (c["id"], c["at"]) if c.get("id") else None
        elif op == "state":
            pool = self.scheduler.kv_cache_manager.block_pool
            emit(
                event="state",
                free=pool.get_num_free_blocks(),
                requests=len(self.scheduler.requests),
                waiting=[r.status.name for r in self.scheduler.requests.values()],
                busy=self.busy(),
                cpu=time.process_time(),
            )
        elif op == "metrics":
            wanted = ("kvferry", "prompt_tokens")
            values = [
                dict(name=m.name, labels=m.labels, value=getattr(m, "value", getattr(m, "count", None)))
                for m in self.llm.get_metrics()
                if any(w in m.name for w in wanted)
            ]
            emit(event="metrics", values=values)
        elif op == "python":
            # An expression over this engine, for a test's access to its internals.
            emit(event="value", value=eval(c["expr"], {"self": self, "time": time}))

    def run(self) -> None:
        rest = b""
        while True:
            ready, _, _ = select.select([0], [], [], 0 if self.busy() and not self.paused() else None)
            if ready:
                got = os.read(0, 1 << 20)
                if not got:
                    return
                *lines, rest = (rest + got).split(b"\n")
                for line in lines:
                    self.command(json.loads(line))
            if self.busy() and not self.paused():
                self.step()
                if self.paused():
                    emit(event="paused", id=self.pause[0], scheduled=self.total(self.pause[0]))
                elif self.idle:
                    # vLLM's own core process does the same. Without the pause, a loop of empty steps keeps both cores busy
                    # and starves the transfers that the steps wait for.
                    time.sleep(0.001)


def live(spec: dict[str, Any]) -> None:
    open_events()
    started = time.monotonic()
    engine = Engine(spec)
    emit(event="ready", seconds=time.monotonic() - started)
    engine.run()
    engine.core.shutdown()


def nursery() -> None:
    """Serves the socket at standard input: each message is a `SPEC` with three descriptors, each answer a process id."""
    import vllm.config
    import vllm.model_executor.models.gemma3
    import vllm.model_executor.models.llama
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker
    from vllm import LLM  # noqa: F401
    from vllm.model_executor.models import registry
    from vllm.v1.executor import multiproc_executor

    import kvferry.vllm  # noqa: F401

    # Two steps of an engine's start import vLLM in yet another process, 10 s of processor time each. vLLM inspects the class
    # of a model in a subprocess, which keeps CUDA out of the engine; and it spawns the ranks of an engine for CPU.
    registry._run_in_subprocess = lambda inspect: inspect()
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")

    requests = socket.socket(fileno=0)
    requests.sendall(b"ready")
    # The nursery does not wait for its engines: a test sees an engine's end by the end of its events.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # A process group of its own: a kill reaches all ranks of the engine.
            os.setsid()
            for to, fd in enumerate(fds):
                os.dup2(fd, to)
                os.close(fd)
            try:
                live(json.loads(message))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        for fd in fds:
            os.close(fd)
        requests.sendall(str(pid).encode())


if __name__ == "__main__":
    nursery()
