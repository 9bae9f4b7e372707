"""The request's `kv_transfer_params`: what routers in use pass between prefill and decode, and our offer in it.

The flow is the one that routers know: the prefill request carries `do_remote_decode`, its response carries
`do_remote_prefill` and what the decode side needs, and the router passes that on unchanged.
"""

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvferry import _native

# Where our part is. Routers pass on what they do not know.
KEY = "kvferry"


class BadParams(ValueError):
    """Params that this connector cannot use."""


def fingerprint(tokens: Sequence[int], *more: str) -> str:
    """Names the tokens that an offer's blocks were computed from, and what else they depend on, so that no other prompt is
    answered with them."""
    numbers = array("q", tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    h = hashlib.blake2b(numbers.tobytes(), digest_size=16)
    for text in more:
        h.update(b"\0" + text.encode())
    return h.hexdigest()


@dataclass(frozen=True)
class Remote:
    """An offer, as a decode request brings it."""

    offer_id: str
    # The offer, JSON.
    offer: str
    # Prompt tokens that its blocks hold.
    tokens: int
    # Of those tokens; `None`: the producer could not tell (embeddings).
    prompt: str | None


def wants_decode(params: dict[str, Any] | None) -> bool:
    """A prefill request whose KV will be fetched."""
    return bool(params) and bool(params.get("do_remote_decode"))


def wants_prefill(params: dict[str, Any] | None) -> bool:
    """A decode request whose KV is elsewhere, and not yet claimed."""
    return bool(params) and bool(params.get("do_remote_prefill"))


def response(
    *,
    engine: str,
    request: str,
    addr: str,
    ranks: list[dict[str, Any]],
    incarnation: str,
    groups: list[dict[str, Any]],
    tokens: int,
    prompt: str | None,
    tp_size: int,
) -> tuple[str, str, dict[str, Any]]:
    """`(offer id, offer, params)` of a finished prefill."""
    offer_id = _native.new_offer_id()
    offer = {
        "id": offer_id,
        "engine": engine,
        "incarnation": incarnation,
        "ranks": ranks,
        "groups": groups,
        "tokens": tokens,
        "request": request[:256],
    }
    host, port = addr.rsplit(":", 1)
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        # What routers look at, or put into their logs.
        "remote_engine_id": engine,
        "remote_request_id": request,
        "remote_host": host.strip("[]"),
        "remote_port": int(port),
        "remote_block_ids": [[0 if b is None else b for b in g["blocks"]] for g in groups],
        "remote_num_tokens": tokens,
        "tp_size": tp_size,
        KEY: {"offer": offer, "prompt": prompt},
    }
    return offer_id, json.dumps(offer, separators=(",", ":")), params


def remote(params: dict[str, Any]) -> Remote:
    """Reads what a prefill's response said. They come from the outside: anything may be in them."""
    ours = params.get(KEY)
    if not isinstance(ours, dict) or not isinstance(ours.get("offer"), dict):
        raise BadParams("no kvferry offer in kv_transfer_params: the prefill engine runs another connector, or none")
    offer, prompt = ours["offer"], ours.get("prompt")
    try:
        text = json.dumps(offer, separators=(",", ":"))
        _native.check_offer(text)
    except (TypeError, ValueError, RecursionError) as e:
        raise BadParams(f"the kvferry offer is not usable: {e}") from e
    if prompt is not None and not isinstance(prompt, str):
        raise BadParams("the kvferry prompt fingerprint is no text")
    return Remote(offer_id=offer["id"], offer=text, tokens=offer["tokens"], prompt=prompt)
