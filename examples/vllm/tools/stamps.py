"""Notes when a vLLM engine queues, schedules, computes and samples, and when a load has ended, whatever its connector.

vLLM loads it as a plugin in each process: `plugin` makes the package that declares the plugin, to be put first in PYTHONPATH. An
event is a line of JSON in the file that KVFERRY_STAMPS names. Times are of CLOCK_MONOTONIC, which all processes of a host share.
"""

import functools
import json
import os
import time
from pathlib import Path
from typing import Any


def plugin(directory: Path) -> str:
    """Makes the package of this plugin. Returns the directory for PYTHONPATH."""
    info = directory / "kvferry_stamps-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvferry-stamps\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nkvferry_stamps = stamps:install\n")
    (directory / "stamps.py").write_text(Path(__file__).read_text())
    return str(directory)


def install() -> None:
    """Follows the scheduler and the worker of this process, where it has them."""
    path = os.environ.get("KVFERRY_STAMPS")
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not path or getattr(Scheduler, "_stamped", False):
        return
    Scheduler._stamped = True  # type: ignore[attr-defined]
    out = open(path, "a", buffering=1)

    def note(event: str) -> None:
        out.write(json.dumps({"event": event, "t": time.monotonic()}) + "\n")

    add, schedule, update = Scheduler.add_request, Scheduler.schedule, Scheduler.update_from_output

    @functools.wraps(add)
    def adding(self: Any, *args: Any, **kwargs: Any) -> Any:
        note("queued")
        return add(self, *args, **kwargs)

    @functools.wraps(schedule)
    def scheduling(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = schedule(self, *args, **kwargs)
        if output.total_num_scheduled_tokens:
            note("scheduled")
        return output

    @functools.wraps(update)
    def updating(self: Any, output: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        transferred = getattr(result, "kv_connector_output", None)
        if transferred is not None and transferred.finished_recving:
            note("loaded")
        if output.total_num_scheduled_tokens:
            note("token")
        return update(self, output, result, *args, **kwargs)

    execute = GPUModelRunner.execute_model

    @functools.wraps(execute)
    def executing(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        result = execute(self, output, *args, **kwargs)
        # The forward pass is done; on CPU nothing runs behind it. The first token is sampled next.
        if output.total_num_scheduled_tokens:
            note("computed")
        return result

    GPUModelRunner.execute_model = executing
    Scheduler.add_request, Scheduler.schedule, Scheduler.update_from_output = adding, scheduling, updating
