"""One vLLM engine in this process, driven by lines of JSON on standard input; what happens comes back the same way.

The loop is a server's: it steps while the engine has something to do, and takes commands in between.

`engine.py SPEC` is one engine. `engine.py --nursery` reads vLLM in, which takes most of an engine's start, and then makes
engines by forking: the test run has one nursery, and each engine is a process of its own all the same.
"""

import json
import os
import re
import select
import signal
import socket
import sys
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

# vLLM's ranks wait for work by yielding in a loop. Where a thread that yields is moved ahead in virtual time (Linux 6.18, and
# 6.12.63: commit 79104becf42b; mended by 1319ea57529e), two of them on two processors keep everything else on the host from
# running, for 15 s and more. Ranks are started afresh from this file, so this holds for them too.
os.sched_yield = lambda: time.sleep(0.0005)

answers: Any = None


def keep_answers_apart() -> None:
    """What the engine prints on standard output goes to standard error; the answers get a descriptor of their own."""
    global answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)


def say(**event: Any) -> None:
    answers.write(json.dumps(event) + "\n")


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
        self._watch()

    def _watch(self) -> None:
        """Counts the tokens that the scheduler really has computed, by request."""
        schedule = self.scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.idle = not output.num_scheduled_tokens
            for request, n in output.num_scheduled_tokens.items():
                self.scheduled[request] = self.scheduled.get(request, 0) + n
            return output

        self.scheduler.schedule = watched

    def worker(self) -> Any:
        """kvferry's worker side, when it is in this process."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    def busy(self) -> bool:
        return self.engine.has_unfinished_requests() or self.scheduler.has_requests()

    def step(self) -> None:
        for out in self.engine.step():
            if out.finished:
                tokens = list(out.outputs[0].token_ids)
                # The engine adds eight random digits to a request's id.
                mine = re.compile(f"{re.escape(out.request_id)}(-[0-9a-f]{{8}})?")
                total = sum(n for r, n in self.scheduled.items() if mine.fullmatch(r))
                say(
                    event="done",
                    id=out.request_id,
                    tokens=tokens,
                    reason=out.outputs[0].finish_reason,
                    params=out.kv_transfer_params,
                    # Of the scheduled tokens, those after the first output are no prompt's.
                    computed=total - max(len(tokens) - 1, 0),
                    prompt=len(out.prompt_token_ids or ()),
                )

    def command(self, c: dict[str, Any]) -> bool:
        from vllm import SamplingParams

        op = c["op"]
        if op == "add":
            extra = {"kv_transfer_params": c["params"]} if c.get("params") else None
            # Greedy; several answers to one prompt must be sampled, from the one best token then.
            n = c.get("n", 1)
            greedy: dict[str, Any] = {"temperature": 0} if n == 1 else {"temperature": 1, "top_k": 1}
            sampling = SamplingParams(
                **greedy, max_tokens=c.get("max_tokens", 16), ignore_eos=True, extra_args=extra, n=n
            )
            prompt: dict[str, Any] = {"prompt_token_ids": c["tokens"]}
            if c.get("salt"):
                prompt["cache_salt"] = c["salt"]
            self.engine.add_request(c["id"], prompt, sampling)
        elif op == "abort":
            self.engine.abort_request([c["id"]])
            say(event="aborted", id=c["id"])
        elif op == "state":
            pool = self.scheduler.kv_cache_manager.block_pool
            say(
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
            say(event="metrics", values=values)
        elif op == "python":
            # A test's own look inside: an expression over this engine.
            say(event="value", value=eval(c["expr"], {"self": self, "time": time}))
        elif op == "quit":
            return False
        return True

    def run(self) -> None:
        rest = b""
        while True:
            ready, _, _ = select.select([0], [], [], 0 if self.busy() else None)
            if ready:
                got = os.read(0, 1 << 20)
                if not got:
                    return
                *lines, rest = (rest + got).split(b"\n")
                for line in lines:
                    if not self.command(json.loads(line)):
                        return
            if self.busy():
                self.step()
                if self.idle:
                    # As vLLM's own core process does: ranks that are asked for nothing in a tight loop keep both cores, and
                    # starve whatever brings the blocks that they wait for.
                    time.sleep(0.001)


def live(spec: dict[str, Any]) -> None:
    keep_answers_apart()
    started = time.monotonic()
    engine = Engine(spec)
    say(event="ready", seconds=time.monotonic() - started)
    engine.run()
    began = time.monotonic()
    engine.core.shutdown()
    say(event="bye", seconds=time.monotonic() - began)


def nursery() -> None:
    """Takes `SPEC`, with three descriptors, on the socket at standard input; answers with a process id each time."""
    import vllm.config
    import vllm.model_executor.models.gemma3
    import vllm.model_executor.models.llama
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker
    from vllm import LLM  # noqa: F401

    import kvferry.vllm  # noqa: F401

    door = socket.socket(fileno=0)
    door.sendall(b"ready")
    # Nobody waits for the engines here: the test sees an engine's end by the end of its answers.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, fds, _, _ = socket.recv_fds(door, 1 << 20, 3)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
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
        door.sendall(str(pid).encode())


if __name__ == "__main__":
    if sys.argv[1] == "--nursery":
        nursery()
    else:
        live(json.loads(sys.argv[1]))
