"""Wakes the engine's loop when an offer is freed or a load has ended. A rank may run in another process than the scheduler, so
the news is a datagram."""

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable

# How long a rank's thread waits before it checks whether it must end, in seconds. Meanwhile it keeps the producer or the
# consumer alive.
LOOK = 0.1


class Alarm:
    """The scheduler's end: calls `ring` for each datagram."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        # Only this user can send.
        self._directory = tempfile.mkdtemp(prefix="kvferry-")
        self.path = os.path.join(self._directory, "news")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        threading.Thread(target=self._listen, name="kvferry-news", daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                self._socket.recv(1)
            except OSError:
                return
            self._ring()

    def close(self) -> None:
        """Removes the address."""
        shutil.rmtree(self._directory, ignore_errors=True)


class Bell:
    """A rank's end: a thread that sends a datagram when there is news. `has`: whether there is news that was not taken; it waits
    for that, for the given seconds at most."""

    def __init__(self, path: str, has: Callable[[float], bool]) -> None:
        self._path, self._has = path, has
        self._polled = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._watch, name="kvferry-bell", daemon=True)
        self._thread.start()

    def polled(self) -> None:
        """The news was taken."""
        self._polled.set()

    def stop(self) -> None:
        """Ends the thread: from now on it does not call `has`."""
        self._stopped = True
        self._polled.set()
        self._thread.join(1)

    def _watch(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            try:
                out.connect(self._path)
                while not self._stopped:
                    if self._has(LOOK):
                        self._polled.clear()
                        # The news may have been taken before the line above: then there is nothing left to tell.
                        if self._has(0):
                            self._send(out)
                            self._polled.wait(1)
            except (OSError, RuntimeError):
                # The scheduler is on another host, or gone; or this end was closed. Without datagrams the loop polls by itself.
                return

    @staticmethod
    def _send(out: socket.socket) -> None:
        try:
            out.send(b"!")
        except BlockingIOError:
            # Its queue is full, so it will wake up anyway.
            pass
