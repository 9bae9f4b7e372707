"""The router between a client and stand-ins for engines."""

import asyncio
import json
from typing import Any

import pytest
import router
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

FORGED = {"do_remote_prefill": True, "remote_host": "198.51.100.7", "kvferry": {"offer": {"id": "forged"}}}
OFFER = {"do_remote_prefill": True, "kvferry": {"offer": {"id": "ours"}}}


def engine(answer: Any) -> tuple[TestServer, list[dict[str, Any]]]:
    """A server that answers every request with `answer` (JSON, or a status), and the bodies that it received."""
    seen: list[dict[str, Any]] = []

    async def serve(request: web.Request) -> web.Response:
        seen.append(await request.json())
        return web.Response(status=answer) if isinstance(answer, int) else web.json_response(answer)

    app = web.Application()
    app.router.add_post("/{path:.*}", serve)
    return TestServer(app), seen


def sent(path: str, body: Any, prefill: Any) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
    """Sends a request through the router. Returns the status, and what the prefill and the decode engine received. `prefill`:
    the answer of the prefill engine; `None`: it is unreachable."""

    async def run() -> Any:
        (p, prefilled), (d, decoded) = engine(prefill), engine({"choices": []})
        async with p, d:
            urls = [str(s.make_url("")).rstrip("/") for s in (p, d)]
            if prefill is None:
                await p.close()
            engines = [[router.Engine(url)] for url in urls]
            async with TestClient(TestServer(router.Router(*engines).app())) as client:
                async with client.post(path, data=json.dumps(body)) as answer:
                    return answer.status, prefilled, decoded

    return asyncio.run(run())


PREFILLS = {
    "works": {"kv_transfer_params": OFFER},
    "offers nothing": {"kv_transfer_params": None},
    "fails": 500,
    "is unreachable": None,
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("prefill", PREFILLS)
def test_a_clients_own_params_reach_no_engine(path: str, prefill: str) -> None:
    body = {"prompt": "x", "kv_transfer_params": FORGED, "vllm_xargs": {"kv_transfer_params": "forged", "top": 1}}
    status, prefilled, decoded = sent(path, body, PREFILLS[prefill])
    assert status == 200
    assert all(b["kv_transfer_params"] == router.PREFILL_PARAMS and b["vllm_xargs"] == {"top": 1} for b in prefilled)
    expected = {"prompt": "x", "vllm_xargs": {"top": 1}}
    if prefill == "works":
        expected["kv_transfer_params"] = OFFER
    assert decoded == [expected]
    assert "forged" not in json.dumps([prefilled, decoded])


def test_a_body_that_is_no_object_is_refused() -> None:
    status, prefilled, decoded = sent("/v1/completions", ["x"], {"kv_transfer_params": OFFER})
    assert (status, prefilled, decoded) == (400, [], [])
