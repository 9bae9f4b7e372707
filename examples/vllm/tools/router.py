"""A small router for one or more prefill engines and decode engines, without the features of a production router.

`python tools/router.py --port 8000 --prefill URL [--prefill URL ...] --decode URL [--decode URL ...]`
`python tools/router.py --port 8000 --overlap --prefill URL BOOTSTRAP_PORT --decode URL BOOTSTRAP_PORT`

A request goes to a prefill engine first, which computes one token and returns `kv_transfer_params`. With these the request
goes to a decode engine, and the router streams its answer to the client. If the prefill engine fails, the decode engine
prefills the prompt itself. If a decode engine is unreachable, the router tries the next one.

With `--overlap`, it names the transfer and sends the request to both engines at the same time: the decode engine loads while the
prefill engine computes. It asks both bootstrap endpoints whether they support this; other pairs take the steps above. If the
prefill engine refuses the request, the decode engine gets it again without a transfer. If the prefill engine dies, the decode
engine keeps the loaded blocks, and computes the rest.

A client's own `kv_transfer_params` reach no engine: they could name an offer of another request, or another producer.
"""

import argparse
import asyncio
import itertools
import json
import logging
import secrets
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

KEY = "kv_transfer_params"
PREFILL_PARAMS = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# Longest wait in seconds for a prefill engine that accepts a request and does not answer.
PREFILL_LIMIT = 120
# Longest wait in seconds for a bootstrap endpoint, and how long its answer is used.
BOOTSTRAP_LIMIT = 2
BOOTSTRAP_FRESH = 5
# The version of kvferry's part in a bootstrap answer that this router knows.
OVERLAP = 1

logger = logging.getLogger("router")


def stripped(body: dict) -> dict:
    """The client's request without `kv_transfer_params`. vLLM also takes them from `vllm_xargs`."""
    body = {k: v for k, v in body.items() if k != KEY}
    if isinstance(xargs := body.get("vllm_xargs"), dict):
        body["vllm_xargs"] = {k: v for k, v in xargs.items() if k != KEY}
    return body


@dataclass(eq=False)
class Engine:
    """An engine, and its bootstrap endpoint if it has one."""

    url: str
    bootstrap: str | None = None
    # The endpoint's last answer, and when it came.
    known: dict[str, Any] | None = None
    asked: float = 0.0


class Refused(Exception):
    """The prefill engine is alive and does not compute the prompt."""


class Router:
    def __init__(self, prefill: list[Engine], decode: list[Engine], overlap: bool = False) -> None:
        self._prefill, self._decode = itertools.cycle(prefill), itertools.cycle(decode)
        self._decodes = len(decode)
        self._overlap = overlap
        self._session: aiohttp.ClientSession | None = None

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.cleanup_ctx.append(self._client)
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/completions", self._serve)
        app.router.add_post("/v1/chat/completions", self._serve)
        return app

    async def _client(self, _app: web.Application):
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            self._session = session
            yield

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _prefilled(self, url: str, body: dict, params: dict, replica: int | None = None) -> dict | None:
        """Has a prompt computed, and returns the `kv_transfer_params` of the answer. `replica`: the data-parallel rank that
        computes it."""
        assert self._session is not None
        asked = {**body, "stream": False, "max_tokens": 1, KEY: params}
        # The prompt is computed once, however many answers the client wants.
        for key in ("stream_options", "min_tokens", "n", "best_of"):
            asked.pop(key, None)
        if "max_completion_tokens" in asked:
            asked["max_completion_tokens"] = 1
        timeout = aiohttp.ClientTimeout(total=PREFILL_LIMIT)
        headers = {} if replica is None else {"X-data-parallel-rank": str(replica)}
        async with self._session.post(url, json=asked, headers=headers, timeout=timeout) as response:
            response.raise_for_status()
            return (await response.json()).get(KEY)

    async def _params(self, engine: Engine, path: str, body: dict) -> dict | None:
        """Prefills the prompt and returns its `kv_transfer_params`; `None` if that fails."""
        try:
            return await self._prefilled(engine.url + path, body, dict(PREFILL_PARAMS))
        except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as e:
            logger.warning("prefill at %s failed (%r): the decode engine prefills instead", engine.url, e)
            return None

    async def _knows(self, engine: Engine) -> dict[str, Any] | None:
        """An engine's bootstrap answer, if it supports overlap."""
        assert self._session is not None
        if engine.bootstrap is None:
            return None
        if time.monotonic() < engine.asked + BOOTSTRAP_FRESH:
            return engine.known
        # Requests that arrive before the answer use the previous one.
        engine.asked = time.monotonic()
        try:
            timeout = aiohttp.ClientTimeout(total=BOOTSTRAP_LIMIT)
            async with self._session.get(f"{engine.bootstrap}/query", timeout=timeout) as response:
                response.raise_for_status()
                replicas = [r for r in (await response.json()).values() if r["kvferry"]["overlap"] == OVERLAP]
                engine.known = replicas[0] if replicas else None
        except (aiohttp.ClientError, TimeoutError, ValueError, AttributeError, KeyError, TypeError) as e:
            logger.warning("no overlap with %s: %s/query: %r", engine.url, engine.bootstrap, e)
            engine.known = None
        return engine.known

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except json.JSONDecodeError as e:
            raise web.HTTPBadRequest(text=f"the body is not JSON: {e}") from e
        if not isinstance(body, dict):
            raise web.HTTPBadRequest(text="the body is not a JSON object")
        body = stripped(body)
        prefill, decode = next(self._prefill), next(self._decode)
        if self._overlap:
            there, here = await asyncio.gather(self._knows(prefill), self._knows(decode))
            if there and here and "name" in there["kvferry"] and here["kvferry"].get("pulls"):
                try:
                    return await self._at_once(request, body, prefill, there, decode)
                except (Refused, aiohttp.ClientConnectorError) as e:
                    logger.warning("prefill at %s or decode at %s: %s", prefill.url, decode.url, e)
                    return await self._decoded(request, body, next(self._decode))
        params = await self._params(prefill, request.path, body)
        return await self._decoded(request, {**body, KEY: params} if params else body, decode)

    async def _decoded(self, request: web.Request, body: dict, decode: Engine) -> web.StreamResponse:
        for _ in range(self._decodes):
            try:
                return await self._pass_on(request, decode.url + request.path, body)
            except aiohttp.ClientConnectorError as e:
                logger.warning("a decode engine is unreachable: %s", e)
                decode = next(self._decode)
        raise web.HTTPBadGateway(text="no decode engine is reachable")

    async def _at_once(
        self, request: web.Request, body: dict, prefill: Engine, there: dict, decode: Engine
    ) -> web.StreamResponse:
        """Sends the request to both engines. Raises `Refused` if the prefill engine refuses it before the first token."""
        transfer = f"xfer-{secrets.token_hex(16)}"
        params = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": transfer,
            "remote_bootstrap_addr": prefill.bootstrap,
            "remote_engine_id": there["engine_id"],
        }
        asked = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer}
        replica = there["kvferry"].get("data_parallel_rank")
        # It becomes a header.
        replica = replica if isinstance(replica, int) else None
        prefilled = asyncio.create_task(self._prefilled(prefill.url + request.path, body, asked, replica))
        try:
            return await self._pass_on(request, decode.url + request.path, {**body, KEY: params}, prefilled)
        finally:
            prefilled.cancel()
            await asyncio.gather(prefilled, return_exceptions=True)

    async def _pass_on(
        self, request: web.Request, url: str, body: dict, prefilled: asyncio.Task | None = None
    ) -> web.StreamResponse:
        answer, first = await self._begun(url, body, prefilled)
        try:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            await response.write(first)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response
        finally:
            # This closes the connection, also after a cancellation; the engine then aborts the request.
            answer.close()

    async def _begun(
        self, url: str, body: dict, prefilled: asyncio.Task | None
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """An answer whose first part has arrived. Raises `Refused` if the prefill engine refuses the prompt before that."""
        beginning = asyncio.create_task(self._begin(url, body))
        try:
            if prefilled is not None:
                await asyncio.wait([beginning, prefilled], return_when=asyncio.FIRST_COMPLETED)
                # After a lost connection, the decode engine goes on with the loaded blocks.
                if not beginning.done() and isinstance(prefilled.exception(), aiohttp.ClientResponseError):
                    raise Refused(f"the prompt is refused: {prefilled.exception()}")
            return await beginning
        except BaseException:
            beginning.cancel()
            (begun,) = await asyncio.gather(beginning, return_exceptions=True)
            if isinstance(begun, tuple):
                begun[0].close()
            raise

    async def _begin(self, url: str, body: dict) -> tuple[aiohttp.ClientResponse, bytes]:
        assert self._session is not None
        answer = await self._session.post(url, json=body, timeout=aiohttp.ClientTimeout(total=None))
        try:
            return answer, await answer.content.readany()
        except BaseException:
            answer.close()
            raise


def engine(given: list[str]) -> Engine:
    """An engine of the command line: a URL, and perhaps the port of its bootstrap endpoint."""
    url, *port = given
    url = url.rstrip("/")
    host = urlsplit(url).hostname or ""
    return Engine(url, f"http://{f'[{host}]' if ':' in host else host}:{int(port[0])}" if port else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    form = dict(action="append", required=True, nargs="+", metavar=("URL", "BOOTSTRAP_PORT"))
    parser.add_argument("--prefill", **form)
    parser.add_argument("--decode", **form)
    parser.add_argument("--overlap", action="store_true", help="load while the prefill runs, where both engines support it")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    # With handler_cancellation, a client that disconnects cancels its request.
    router = Router([engine(e) for e in args.prefill], [engine(e) for e in args.decode], args.overlap)
    web.run_app(router.app(), host=args.host, port=args.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
