"""The health of a vLLM server whose connector needs a restart.

vLLM asks no connector for its health. The metrics of all ranks arrive in the server's process, so its health check is extended
there: after a wedge `/health` is 503, and an orchestrator restarts the server. Until then it answers requests.
"""

import functools
from typing import Any

from kvferry.vllm.guard import logger

# Reasons for which only a restart helps: memory is withheld.
BAD = ("wedged", "died")

# By engine.
_bad: dict[int, str] = {}
_extended = False


def set_bad(engine: int, reason: str) -> None:
    """Sets why an engine needs a restart; empty: it needs none."""
    if not reason:
        _bad.pop(engine, None)
        return
    if engine not in _bad:
        logger.error("kvferry: engine %d needs a restart (%s): the server's health check fails from now on", engine, reason)
    _bad[engine] = reason
    _extend()


def _extend() -> None:
    global _extended
    if _extended:
        return
    _extended = True
    try:
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError
    except ImportError:
        logger.exception("kvferry: this version of vLLM has another health check, which will not fail")
        return
    check = AsyncLLM.check_health

    @functools.wraps(check)
    async def extended(self: Any) -> None:
        await check(self)
        if _bad:
            raise EngineDeadError(f"kvferry needs a restart: {', '.join(sorted(set(_bad.values())))}")

    AsyncLLM.check_health = extended  # type: ignore[method-assign]
