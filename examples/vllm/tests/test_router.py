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


KNOWS = {"0": {"engine_id": "prefill-0", "kvferry": {"overlap": 1, "name": {}, "pulls": True}}}


class Engines:
    """A prefill and a decode engine, and what they received, in order."""

    def __init__(self, prefill: Any = "answers", there: Any = KNOWS, here: Any = KNOWS) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.replicas: list[str | None] = []
        self._prefill, self._decoding, self._end = prefill, asyncio.Event(), asyncio.Event()
        self.servers = [self._server("prefill", there), self._server("decode", here)]

    def _server(self, name: str, known: Any) -> TestServer:
        app = web.Application()
        app.router.add_get("/query", self._tell(known))
        app.router.add_post("/{path:.*}", self._serve_prefill if name == "prefill" else self._serve_decode)
        return TestServer(app)

    @staticmethod
    def _tell(known: Any) -> Any:
        async def tell(_request: web.Request) -> web.Response:
            return web.Response(status=known) if isinstance(known, int) else web.json_response(known)

        return tell

    async def _serve_prefill(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.seen.append(("prefill", body))
        self.replicas.append(request.headers.get("X-data-parallel-rank"))
        if "transfer_id" in body["kv_transfer_params"]:
            # The router must not wait for this answer.
            await self._decoding.wait()
        if self._prefill == "dies":
            assert request.transport is not None
            request.transport.abort()
        if isinstance(self._prefill, int):
            return web.Response(status=self._prefill)
        self._end.set()
        return web.json_response({"kv_transfer_params": OFFER})

    async def _serve_decode(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.seen.append(("decode", body))
        if "transfer_id" in body.get("kv_transfer_params", {}):
            self._decoding.set()
            if self._prefill == "dies":
                # It goes on with the loaded blocks.
                await asyncio.sleep(0.2)
            elif isinstance(self._prefill, int):
                await request.content.read()
                # It waits for its offer, until the router leaves it.
                assert request.transport is not None
                while not request.transport.is_closing():
                    await asyncio.sleep(0.01)
            else:
                await self._end.wait()
        return web.json_response({"choices": []})


def overlapped(path: str, body: Any, **more: Any) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
    """Sends a request through the router with overlap. Returns the status, and what the engines received."""

    async def run() -> Any:
        engines = Engines(**more)
        p, d = engines.servers
        async with p, d:
            urls = [str(s.make_url("")).rstrip("/") for s in (p, d)]
            known = [[router.Engine(url, url)] for url in urls]
            async with TestClient(TestServer(router.Router(*known, overlap=True).app())) as client:
                async with client.post(path, json=body) as answer:
                    return answer.status, [*engines.seen, *(("replica", r) for r in engines.replicas if r is not None)]

    return asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_with_overlap_both_engines_have_the_request_at_the_same_time(path: str) -> None:
    body = {"prompt": "x", "max_tokens": 9, "stream": True, "kv_transfer_params": FORGED}
    status, seen = overlapped(path, body)
    assert status == 200 and sorted(name for name, _ in seen) == ["decode", "prefill"]
    bodies = dict(seen)
    there, here = (bodies[name].pop("kv_transfer_params") for name in ("prefill", "decode"))
    assert bodies == {
        "prefill": {"prompt": "x", "max_tokens": 1, "stream": False},
        "decode": {"prompt": "x", "max_tokens": 9, "stream": True},
    }
    transfer = there["transfer_id"]
    assert there == {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer}
    address = here.pop("remote_bootstrap_addr")
    assert address.startswith("http://127.0.0.1:") and here == {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": transfer,
        "remote_engine_id": "prefill-0",
    }


def test_the_replica_that_makes_the_offer_gets_the_prompt_once() -> None:
    knows = {"3": {"engine_id": "prefill-3", "kvferry": KNOWS["0"]["kvferry"] | {"data_parallel_rank": 3}}}
    status, seen = overlapped("/v1/completions", {"prompt": "x", "n": 2, "best_of": 4}, there=knows)
    assert status == 200 and ("replica", "3") in seen
    bodies = dict(seen)
    assert "n" not in bodies["prefill"] and "best_of" not in bodies["prefill"]
    assert (bodies["decode"]["n"], bodies["decode"]["best_of"]) == (2, 4)


UNKNOWING = {
    "another connector": {"0": {"engine_id": "x"}},
    "another version": {"0": {"engine_id": "x", "kvferry": {"overlap": 2}}},
    "no engine": {},
    "no endpoint": 404,
    "nonsense": [1],
}


@pytest.mark.parametrize("side", ["there", "here"])
@pytest.mark.parametrize("known", UNKNOWING)
def test_a_pair_that_does_not_know_overlap_is_served_in_sequence(side: str, known: str) -> None:
    status, seen = overlapped("/v1/completions", {"prompt": "x"}, **{side: UNKNOWING[known]})
    assert status == 200 and [name for name, _ in seen] == ["prefill", "decode"]
    assert seen[0][1]["kv_transfer_params"] == router.PREFILL_PARAMS
    assert seen[1][1]["kv_transfer_params"] == OFFER


@pytest.mark.parametrize("status", [400, 503])
def test_a_refused_prefill_sends_the_prompt_to_the_decode_engine_again(status: int) -> None:
    answered, seen = overlapped("/v1/completions", {"prompt": "x"}, prefill=status)
    assert answered == 200
    assert [body for name, body in seen if name == "decode"][1:] == [{"prompt": "x"}]


def test_a_prefill_that_dies_leaves_the_decode_engine_what_it_has() -> None:
    status, seen = overlapped("/v1/completions", {"prompt": "x"}, prefill="dies")
    assert status == 200 and [name for name, _ in seen].count("decode") == 1


def test_an_engine_of_the_command_line() -> None:
    assert router.engine(["http://10.0.0.1:8100/"]).bootstrap is None
    assert router.engine(["http://[fd00::1]:8100", "8998"]).bootstrap == "http://[fd00::1]:8998"
