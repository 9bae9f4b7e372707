"""A request's `kv_transfer_params`: the keys that existing routers use, and the name of kvferry's offer.

Existing routers work unchanged: the prefill request carries `do_remote_decode`; its response carries
`do_remote_prefill` and the name; the router copies these into the decode request. A name has a secret token and no block
ids: only the prefill engine's own table says which blocks are read.
"""

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kvferry import _native

if TYPE_CHECKING:
    from vllm.v1.request import Request

# The key of kvferry's part. Routers pass on unknown keys.
KEY = "kvferry"
# Fewest and most characters of a transfer id. The offer's secret is derived from it, so a short one could be guessed.
TRANSFER = (16, 256)
# The keys of a name's fingerprints: of the prompt's tokens, of the weights, and of the LoRA adapter. The consumer compares them
# with the producer's own, so a client that changes one gets nothing loaded.
PROMPT, WEIGHTS, ADAPTER = "prompt", "weights", "adapter"


class BadParams(ValueError):
    """Params that this connector cannot use."""


class Refused(BadParams):
    """An offer that this engine must not load. `part`: the part that does not fit."""

    def __init__(self, part: str, why: str) -> None:
        super().__init__(why)
        self.part = part


class NoPeer(BadParams):
    """A prefill engine whose running prefills cannot be loaded. `key`: the engine and the cause, for the log."""

    def __init__(self, bootstrap: str, why: str) -> None:
        super().__init__(f"no running prefill can be loaded from prefill engine {bootstrap!r:.200}: {why}")
        self.key = (bootstrap, why)


def fingerprint(tokens: Sequence[int], *more: str) -> str:
    """A hash of the tokens that an offer's blocks were computed from, and of everything else that the blocks depend on. It
    keeps another prompt from using them."""
    numbers = array("q", tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    h = hashlib.blake2b(numbers.tobytes(), digest_size=16)
    for text in more:
        h.update(b"\0" + text.encode())
    return h.hexdigest()


def prompt_fingerprint(request: "Request", tokens: int) -> str | None:
    """The fingerprint of a request's first `tokens` tokens. `None`: the prompt has neither token ids nor embeddings."""
    ids, embeds = request.prompt_token_ids, getattr(request, "prompt_embeds", None)
    if ids is None and embeds is None:
        return None
    # Images and other media: their placeholder tokens are all equal, so their identifiers count too.
    seen = [f"{f.identifier}@{f.mm_position.offset}" for f in getattr(request, "mm_features", None) or ()]
    if embeds is not None:
        part = embeds[:tokens].detach().cpu().contiguous()
        is_ids = getattr(request, "prompt_is_token_ids", None)
        values = hashlib.blake2b(part.view(torch.uint8).numpy(), digest_size=16).hexdigest()
        seen.append(f"{part.dtype} {tuple(part.shape)} {values} {None if is_ids is None else list(is_ids)[:tokens]}")
    return fingerprint((ids or ())[:tokens], *seen)


@dataclass(frozen=True)
class Remote:
    """The offer in a decode request."""

    offer_id: str
    # The name of the offer (JSON). It contains a secret: never log it.
    offer: str = field(repr=False)
    # Number of prompt tokens in its blocks.
    tokens: int
    # Fingerprints of the prompt and the weights of its KV.
    fingerprints: dict[str, str]
    # The engine that made it.
    engine: str
    # Whether the prefill may not have begun: its request waits in a queue.
    awaited: bool = False


def wants_decode(params: dict[str, Any] | None) -> bool:
    """Whether a decode engine will fetch the request's KV."""
    return bool(params) and bool(params.get("do_remote_decode"))


def wants_prefill(params: dict[str, Any] | None) -> bool:
    """Whether the request's KV is on a prefill engine and not yet claimed."""
    return bool(params) and bool(params.get("do_remote_prefill"))


def transfer(params: dict[str, Any] | None) -> str | None:
    """The id that a router has given the transfer; `None` if there is none. Raises `BadParams`."""
    found = (params or {}).get("transfer_id")
    if found is None:
        return None
    if not isinstance(found, str) or not TRANSFER[0] <= len(found) <= TRANSFER[1] or not found.isprintable():
        raise BadParams(f"transfer_id is not a text of {TRANSFER[0]} to {TRANSFER[1]} characters")
    return found


def is_minted(params: dict[str, Any]) -> bool:
    """Whether a decode request names its offer by a transfer id alone: the prefill may still run."""
    return KEY not in params and params.get("transfer_id") is not None


def minted(
    transfer: str,
    *,
    engine: str,
    incarnation: str,
    ranks: list[tuple[int, str, str]],
    request: str,
    tokens: int,
    fingerprints: dict[str, str],
    seal_keys: list[bytes],
) -> tuple[str, str]:
    """`(offer id, name)` of an offer that both engines name after a transfer id. `tokens`: those of the whole prompt."""
    return _native.name_offer(
        engine=engine,
        incarnation=incarnation,
        ranks=ranks,
        tokens=tokens,
        request=request[:256],
        fingerprints=fingerprints,
        seal_keys=seal_keys,
        transfer=transfer,
    )


def response(*, engine: str, request: str, addr: str, tokens: int, tp_size: int, name: str) -> dict[str, Any]:
    """The params of a finished prefill, for the decode engine."""
    host, port = addr.rsplit(":", 1)
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        # Keys that routers read or log.
        "remote_engine_id": engine,
        "remote_request_id": request,
        "remote_host": host.strip("[]"),
        "remote_port": int(port),
        "remote_block_ids": [],
        "remote_num_tokens": tokens,
        "tp_size": tp_size,
        KEY: {"offer": json.loads(name)},
    }


def remote(params: dict[str, Any], seal_keys: list[bytes]) -> Remote:
    """Reads the params of a prefill response. They are untrusted input."""
    ours = params.get(KEY)
    if not isinstance(ours, dict) or not isinstance(ours.get("offer"), dict):
        raise BadParams("no kvferry offer in kv_transfer_params: the prefill engine uses another connector or none")
    offer = ours["offer"]
    try:
        text = json.dumps(offer, separators=(",", ":"))
        _native.check_offer(text, seal_keys)
    except (TypeError, ValueError, RecursionError) as e:
        raise BadParams(f"the kvferry offer is unusable: {e}") from e
    return Remote(
        offer_id=offer["id"],
        offer=text,
        tokens=offer["tokens"],
        fingerprints=dict(offer.get("fingerprints", {})),
        engine=str(offer["engine"]),
    )
