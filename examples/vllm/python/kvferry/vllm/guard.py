"""Keeps exceptions away from vLLM: an exception in a worker's method kills the whole server. Only an error at the start may do
so, if the operator wants that."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from vllm.logger import init_logger

# A logger with this prefix has vLLM's handlers.
logger = init_logger("vllm.kvferry")

F = TypeVar("F", bound=Callable[..., Any])

# Not errors of kvferry: the process is asked to exit.
ENDING = (KeyboardInterrupt, SystemExit, GeneratorExit)


class StartFailed(RuntimeError):
    """kvferry cannot start, and the operator wants the engine to stop then."""


def never_raises(otherwise: Callable[[], Any]) -> Callable[[F], F]:
    """Makes a method log its exceptions and return `otherwise()` instead.

    It catches `BaseException`, because a panic in the native part is one.
    """

    def wrap(method: F) -> F:
        @functools.wraps(method)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except (StartFailed, *ENDING):
                raise
            except BaseException:
                logger.exception("kvferry: %s failed; the engine continues without its result", method.__name__)
                return otherwise()

        return guarded  # type: ignore[return-value]

    return wrap
