"""The bootstrap endpoint: a decode engine learns the identity of a prefill engine there, before the prefill has run.

The scheduler side serves it over HTTP, from a thread of its own that touches nothing else. `GET /query` answers as the server
of Mooncake's connector does, so routers for it can use this one: `{"0": {"engine_id": …, "worker_addr": {}, "kvferry": …}}`,
by data-parallel replica. kvferry's part is the name of an offer that is never made: it holds the engine, its incarnation and the
addresses of its ranks, within a name's bounds, and is sealed where names are.
"""

import asyncio
import json
import socket
import threading
from typing import Any

from kvferry import _native

# Version of kvferry's part. Engines with another one do not overlap.
OVERLAP = 1
# Longest request in bytes, longest time in seconds for one, and connections at a time. A request is one line and a few headers.
REQUEST_BYTES = 8192
REQUEST_SECONDS = 2.0
CONNECTIONS = 64


def entry(
    *,
    engine: str,
    incarnation: str | None,
    ranks: list[tuple[int, str, str]],
    seal_keys: list[bytes],
    pulls: bool,
    replica: int = 0,
) -> dict[str, Any]:
    """This engine's entry in the answer. Without an incarnation it offers nothing. `pulls`: whether it loads. `replica`: its
    data-parallel rank, which a router sends with a prompt (the header `X-data-parallel-rank`): the offer is made by this replica
    alone."""
    ours: dict[str, Any] = {"overlap": OVERLAP, "pulls": pulls, "data_parallel_rank": replica}
    if incarnation is not None:
        _, name = _native.name_offer(
            engine=engine,
            incarnation=incarnation,
            ranks=ranks,
            tokens=0,
            request="bootstrap",
            fingerprints={},
            seal_keys=seal_keys,
        )
        ours["name"] = json.loads(name)
    return {"engine_id": engine, "worker_addr": {}, "kvferry": ours}


class Server:
    """Serves one answer, which may be replaced. Raises `OSError` if the address cannot be used."""

    def __init__(self, host: str, port: int, replica: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host.strip("[]"), port), family=family)
        self.port: int = self._socket.getsockname()[1]
        self._key = str(replica)
        self._answer = b"{}"
        self._open = 0
        self._loop, self._ending = asyncio.new_event_loop(), asyncio.Event()
        threading.Thread(target=self._run, name="kvferry-bootstrap", daemon=True).start()

    def set(self, entry: dict[str, Any]) -> None:
        """Replaces the answer."""
        self._answer = json.dumps({self._key: entry}).encode()

    def close(self) -> None:
        """Stops serving, soon."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ending.set)

    def _run(self) -> None:
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        server = await asyncio.start_server(self._serve, sock=self._socket, limit=REQUEST_BYTES)
        await self._ending.wait()
        server.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= CONNECTIONS:
                await asyncio.wait_for(self._reply(reader, writer), REQUEST_SECONDS)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            # A client that is slow, gone, or sends too much; or the end of the server.
            pass
        finally:
            self._open -= 1
            writer.close()

    async def _reply(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) == 3 and words[0] == b"GET" and words[1].split(b"?")[0] == b"/query":
            status, body = b"200 OK", self._answer
        else:
            status, body = b"404 Not Found", b'{"error": "use GET /query"}'
        writer.write(
            b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
            % (status, len(body), body)
        )
        await writer.drain()
