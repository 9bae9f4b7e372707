"""Log lines that repeat: the first of a kind is logged, then at most one a minute, with the number of those in between."""

import time
from collections.abc import Callable, Hashable

# Shortest time between two lines of a kind, in seconds.
EVERY = 60.0
# Kinds that are remembered. Peers and clients choose some of them, so there is a bound.
KINDS = 1024


class Repeats:
    """The kinds of lines that were logged lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By kind: when it was logged, and how many were not logged since.
        self._kinds: dict[Hashable, tuple[float, int]] = {}

    def log(self, say: Callable[[str], None], kind: Hashable, line: str) -> None:
        """Logs a line, unless one of its kind was logged within the last minute."""
        now = self._clock()
        known = self._kinds.get(kind)
        if known is not None and now < known[0] + EVERY:
            self._kinds[kind] = (known[0], known[1] + 1)
            return
        if len(self._kinds) >= KINDS and known is None:
            self._kinds = {k: v for k, v in self._kinds.items() if now < v[0] + EVERY}
            if len(self._kinds) >= KINDS:
                self._kinds.clear()
        self._kinds[kind] = (now, 0)
        say(line + (f" ({known[1]} more like this since the last such line)" if known and known[1] else ""))
