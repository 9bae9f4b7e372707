"""The state of the engine core that no hook reports: whether it shuts down, whether a request has arrived, and
whether weights or LoRA adapters were replaced.

vLLM makes the scheduler's connector inside the engine core's constructor, so the core is found on the call stack. Its methods
for weights and adapters are wrapped on that one object. If another version of vLLM lacks a part, the feature that needs it is
off, and a line in the log says so.
"""

import atexit
import functools
import queue
import sys
from collections.abc import Callable
from typing import Any

from kvferry.vllm.guard import ENDING, logger
from kvferry.vllm.wake import Alarm
from kvferry.vllm.weights import Adapters

# Longest wait in an idle step, in seconds. A rank in a process of its own spins for one second after each step.
IDLE_WAIT = 20.0
# The same while a load runs. A datagram tells its end, unless it is lost.
LOAD_WAIT = 10.0
# Steps without a wait after an event: with asynchronous scheduling, a step's report arrives with the next one.
BRISK = 3


def find() -> Any:
    """The engine core whose constructor is running; `None` if there is none."""
    try:
        from vllm.v1.engine.core import EngineCore
    except ImportError:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, EngineCore):
            return candidate
        frame = frame.f_back
    return None


class Core:
    """The engine core of this process."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.adapters = Adapters()
        # Number of times that weights were replaced in place.
        self.updates = 0
        self._brisk = BRISK
        self._rung = False
        self._alarm: Alarm | None = None
        self._no_alarm = False
        # Whether the prefix cache may hold KV of earlier weights.
        self.stale = False
        if core is None:
            logger.warning("kvferry: the engine core was not found, so weights that are replaced in place go unnoticed")
            return
        self._after("collective_rpc", self._called_workers)
        self._after("reset_prefix_cache", self._cache_reset)
        self._before("add_lora", lambda adapter, *_, **__: self.adapters.loading(adapter))
        self._before("remove_lora", lambda adapter_id, *_, **__: self.adapters.removing(adapter_id))

    def _wrap(self, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        method = getattr(self._core, name, None)
        if method is None:
            logger.warning("kvferry: this version of vLLM has no EngineCore.%s; its changes go unnoticed", name)
            return
        setattr(self._core, name, functools.wraps(method)(make(method)))

    def _before(self, name: str, note: Callable[..., None]) -> None:
        def make(method: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                _quietly(name, note, *args, **kwargs)
                return method(*args, **kwargs)

            return noted

        self._wrap(name, make)

    def _after(self, name: str, note: Callable[..., None]) -> None:
        def make(method: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                result = None
                try:
                    result = method(*args, **kwargs)
                    return result
                finally:
                    _quietly(name, note, result, *args, **kwargs)

            return noted

        self._wrap(name, make)

    def _called_workers(self, _result: Any, method: Any, *_args: Any, **_kwargs: Any) -> None:
        # A function has a name too. Some frameworks for reinforcement learning send their own.
        name = method if isinstance(method, str) else getattr(method, "__name__", "")
        if replaces_weights(name):
            self.updates += 1
            self.stale = True
            logger.info("kvferry: the weights were replaced in place (%s), %d times so far", name, self.updates)

    def _cache_reset(self, result: Any, *_args: Any, **_kwargs: Any) -> None:
        # vLLM refuses while requests run.
        if result:
            self.stale = False
            self.adapters.cache_reset()

    # ---- state --------------------------------------------------------------------------------------------------------

    def stopping(self) -> bool:
        """Whether the engine was told to stop, and finishes its requests."""
        state = getattr(self._core, "shutdown_state", None)
        return state is not None and state.value > 0

    def unfinished(self, loading: int = 0) -> bool:
        """Whether there is a request that is neither finished nor one of the `loading` ones."""
        scheduler = getattr(self._core, "scheduler", None)
        return scheduler is None or scheduler.get_num_unfinished_requests() > loading

    def alarm(self) -> str | None:
        """The address at which ranks ring; `None`: this process has no loop of its own, or no socket."""
        if self._alarm is None and self._arriving() is not None and not self._no_alarm:
            try:
                self._alarm = Alarm(self._ring)
            except (OSError, RuntimeError) as e:
                # The messages of this step must reach the workers without it.
                self._no_alarm = True
                logger.warning("kvferry: an idle engine notices the end of a load up to %.0f s late: %s", LOAD_WAIT, e)
                return None
            atexit.register(self._alarm.close)
        return None if self._alarm is None else self._alarm.path

    def _arriving(self) -> "queue.Queue[Any] | None":
        arriving = getattr(self._core, "input_queue", None)
        return arriving if isinstance(arriving, queue.Queue) else None

    def _ring(self) -> None:
        if (arriving := self._arriving()) is not None:
            with arriving.not_empty:
                self._rung = True
                arriving.not_empty.notify()

    def busy(self) -> None:
        """This step has something to do."""
        # With pipeline parallelism, a step's report arrives once the queue of steps is full.
        self._brisk = max(BRISK, 1 + getattr(self._core, "batch_queue_size", 1))

    def wait(self, loading: int = 0, limit: float = IDLE_WAIT) -> None:
        """Waits for the next request, command, freed offer or ended load, for `limit` seconds at most. For a step in which nothing
        runs and only `loading` requests wait, each for a load. Without this, vLLM's loop makes a thousand such steps a second
        while finished requests are held for a decode engine, or while a prompt is loaded whose prefill still runs."""
        arriving = self._arriving()
        # A rank of a data-parallel engine must keep pace with the others.
        if arriving is None or getattr(self._core, "engines_running", False) or self.unfinished(loading):
            return self.busy()
        if self._brisk > 0:
            self._brisk -= 1
            return
        with arriving.not_empty:
            limit = min(limit, LOAD_WAIT if loading else IDLE_WAIT)
            if arriving.not_empty.wait_for(lambda: arriving._qsize() or self._rung, limit):
                self.busy()
            self._rung = False

    def fail(self, requests: list[str]) -> None:
        """Ends requests with an error. Their blocks stay withheld until their loads are reported."""
        from vllm.v1.engine import FinishReason
        from vllm.v1.request import RequestStatus

        if self._core is None:
            return
        scheduler, send = self._core.scheduler, getattr(self._core, "_send_finish_outputs_to_client", None)
        for request in scheduler.finish_requests(requests, RequestStatus.FINISHED_ERROR):
            if send is not None:
                send([request.request_id], request.client_index, FinishReason.ERROR)


def replaces_weights(method: str) -> bool:
    """Whether a call of all workers with this name may change weights: `reload_weights`, `update_weights`,
    `finish_weight_update`, a framework's `update_weight`, …"""
    name = method.lower()
    reads = name.startswith(("get", "check", "compute", "dump", "save", "init", "start", "report"))
    return "weight" in name and not reads


def _quietly(name: str, note: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    try:
        note(*args, **kwargs)
    except ENDING:
        raise
    except BaseException:
        logger.exception("kvferry: EngineCore.%s could not be followed", name)
