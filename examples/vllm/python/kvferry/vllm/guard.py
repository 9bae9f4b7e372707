"""Keeps exceptions out of vLLM: one that leaves a worker's method kills the whole server."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from vllm.logger import init_logger

# The prefix is what gives a logger vLLM's handlers.
logger = init_logger("vllm.kvferry")

F = TypeVar("F", bound=Callable[..., Any])

# What is not an error of ours: the process is asked to end.
ENDING = (KeyboardInterrupt, SystemExit, GeneratorExit)


def never_raises(otherwise: Callable[[], Any]) -> Callable[[F], F]:
    """A method that logs what goes wrong in it, and returns `otherwise()`.

    A panic in the native part is a `BaseException`, so that is what is caught.
    """

    def wrap(method: F) -> F:
        @functools.wraps(method)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except ENDING:
                raise
            except BaseException:
                logger.exception("kvferry: %s failed; the engine goes on without it", method.__name__)
                return otherwise()

        return guarded  # type: ignore[return-value]

    return wrap
