"""A small router for one or more prefill engines and decode engines, without the features of a production router.

`python tools/router.py --port 8000 --prefill URL [--prefill URL ...] --decode URL [--decode URL ...]`

A request goes to a prefill engine first, which computes one token and returns `kv_transfer_params`. With these the request
goes to a decode engine, and the router streams its answer to the client. If the prefill engine fails, the decode engine
prefills the prompt itself. If a decode engine is unreachable, the router tries the next one.

A client's own `kv_transfer_params` reach no engine: they could name an offer of another request, or another producer.
"""

import argparse
import itertools
import json
import logging

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

logger = logging.getLogger("router")


def stripped(body: dict) -> dict:
    """The client's request without `kv_transfer_params`. vLLM also takes them from `vllm_xargs`."""
    body = {k: v for k, v in body.items() if k != KEY}
    if isinstance(xargs := body.get("vllm_xargs"), dict):
        body["vllm_xargs"] = {k: v for k, v in xargs.items() if k != KEY}
    return body


class Router:
    def __init__(self, prefill: list[str], decode: list[str]) -> None:
        self._prefill, self._decode = itertools.cycle(prefill), itertools.cycle(decode)
        self._decodes = len(decode)
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

    async def _params(self, path: str, body: dict) -> dict | None:
        """Prefills the prompt and returns its `kv_transfer_params`; `None` if that fails."""
        assert self._session is not None
        asked = {**body, "stream": False, "max_tokens": 1, KEY: dict(PREFILL_PARAMS)}
        asked.pop("stream_options", None)
        asked.pop("min_tokens", None)
        if "max_completion_tokens" in asked:
            asked["max_completion_tokens"] = 1
        url = next(self._prefill) + path
        try:
            timeout = aiohttp.ClientTimeout(total=PREFILL_LIMIT)
            async with self._session.post(url, json=asked, timeout=timeout) as response:
                response.raise_for_status()
                return (await response.json()).get(KEY)
        except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as e:
            logger.warning("prefill at %s failed (%r): the decode engine prefills instead", url, e)
            return None

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except json.JSONDecodeError as e:
            raise web.HTTPBadRequest(text=f"the body is not JSON: {e}") from e
        if not isinstance(body, dict):
            raise web.HTTPBadRequest(text="the body is not a JSON object")
        body = stripped(body)
        params = await self._params(request.path, body)
        if params:
            body = {**body, KEY: params}
        for _ in range(self._decodes):
            try:
                return await self._pass_on(request, next(self._decode) + request.path, body)
            except aiohttp.ClientConnectorError as e:
                logger.warning("a decode engine is unreachable: %s", e)
        raise web.HTTPBadGateway(text="no decode engine is reachable")

    async def _pass_on(self, request: web.Request, url: str, body: dict) -> web.StreamResponse:
        assert self._session is not None
        # Leaving this block closes the connection, also after a cancellation; the engine then aborts the request.
        async with self._session.post(url, json=body, timeout=aiohttp.ClientTimeout(total=None)) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefill", action="append", required=True)
    parser.add_argument("--decode", action="append", required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    # With handler_cancellation, a client that disconnects cancels its request.
    web.run_app(
        Router(args.prefill, args.decode).app(), host=args.host, port=args.port, print=None, handler_cancellation=True
    )


if __name__ == "__main__":
    main()
