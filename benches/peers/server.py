"""The process that serves a benchmark's blocks. A reader that waited for a dead one would wait for minutes."""
import multiprocessing as mp
import multiprocessing.connection
import os
import sys
import threading


class Server:
    """Runs `serve(*args)` in a process of its own. It returns what the reader needs, and what must stay alive meanwhile.

    When the process ends before `stop`, this one ends too, at once. The last line of standard error is the reason.
    """

    def __init__(self, serve, *args):
        ctx = mp.get_context("spawn")
        self._pipe, theirs = ctx.Pipe()
        self._process = ctx.Process(target=_run, args=(serve, args, theirs))
        self._process.start()
        theirs.close()
        self._stopping = False
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self):
        mp.connection.wait([self._process.sentinel])
        if self._stopping:
            return
        self._process.join()
        # After code 1, Python has printed the exception.
        if self._process.exitcode != 1:
            print(f"the process that serves the blocks ended with code {self._process.exitcode}", file=sys.stderr, flush=True)
        os._exit(1)

    def ready(self):
        """Waits for the answer of `serve`."""
        try:
            return self._pipe.recv()
        except EOFError:
            # It is dead, so the watcher ends this process.
            self._watcher.join()
            raise

    def stop(self):
        self._stopping = True
        self._pipe.close()
        self._process.join(timeout=5)
        self._process.kill()


def _run(serve, args, pipe):
    ready, _alive = serve(*args)
    pipe.send(ready)
    try:
        pipe.recv()
    except EOFError:
        # The reader has stopped, or is dead.
        pass
