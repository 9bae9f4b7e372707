"""The offers in decode requests: which ones this engine may load, and why others are refused.

An offer is used once. A prompt whose offer is refused is prefilled here, and the offer is released.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvferry.vllm import params as kv_params
from kvferry.vllm.guard import logger
from kvferry.vllm.peers import ASK_SECONDS, Asking, Peers
from kvferry.vllm.repeats import Repeats
from kvferry.vllm.stats import KvFerryStats
from kvferry.vllm.weights import Unknown

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Used offers to remember: a second request with the same offer (parallel sampling, a retry) is prefilled here.
REMEMBERED = 1 << 16
# Offers of one engine that are refused for the same cause before an ERROR line tells the operator.
MISMATCHES = 3


class Remotes:
    """The offers in the decode requests of one engine. `weights_of`: the fingerprints of the weights that a request's KV is
    computed from here. `release`: releases the offer with this name (JSON)."""

    def __init__(
        self,
        seal_keys: list[bytes],
        peers: Peers,
        stats: KvFerryStats,
        repeats: Repeats,
        weights_of: Callable[["Request"], dict[str, str]],
        release: Callable[[str], None],
    ) -> None:
        self._seal_keys, self.peers, self._stats, self._repeats = seal_keys, peers, stats, repeats
        self._weights_of, self._release = weights_of, release
        # Why this engine loads nothing; empty: it loads.
        self.off = ""
        # The offers of requests that were looked up and not yet admitted.
        self._known: dict[str, kv_params.Remote] = {}
        # Since when each request has waited for the answer of an endpoint, by `time.monotonic`.
        self._asked: dict[str, float] = {}
        self._used: OrderedDict[str, None] = OrderedDict()
        # Refused offers, by engine and cause.
        self._refusals: dict[tuple[str, str], int] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._known

    def peek(self, request_id: str) -> kv_params.Remote | None:
        """The offer of a request that was looked up."""
        return self._known.get(request_id)

    def pop(self, request_id: str) -> kv_params.Remote | None:
        """Like `peek`, and forgets the offer."""
        self._asked.pop(request_id, None)
        return self._known.pop(request_id, None)

    def use(self, remote: kv_params.Remote) -> None:
        """No other request uses this offer."""
        self._used[remote.offer_id] = None
        if len(self._used) > REMEMBERED:
            self._used.popitem(last=False)

    def loads(self, remote: kv_params.Remote) -> None:
        """The offer is loaded."""
        self.use(remote)
        for part in (kv_params.WEIGHTS, kv_params.ADAPTER):
            self._refusals.pop((remote.engine, part), None)

    def end(self, request: "Request", params: dict[str, Any]) -> None:
        """The request ended before its admission: releases its offer, so that its blocks are free before the lease ends."""
        remote = self.pop(request.request_id)
        if self.off:
            return
        if remote is None:
            try:
                minted = kv_params.is_minted(params)
                remote = self.minted(request, params) if minted else kv_params.remote(params, self._seal_keys)
            except (kv_params.BadParams, Asking):
                return
        if remote.offer_id not in self._used:
            self.use(remote)
            self._release(remote.offer)

    def get(self, request: "Request") -> kv_params.Remote | None:
        """The request's offer, parsed once. An unusable offer is refused once, and the prompt is prefilled here. Raises `Asking`
        while the prefill engine's endpoint has not answered, for `ASK_SECONDS` at most."""
        params, remote = request.kv_transfer_params, self._known.get(request.request_id)
        assert params is not None
        try:
            if remote is None and not kv_params.is_minted(params):
                remote = kv_params.remote(params, self._seal_keys)
                self._check_prompt(request, remote)
            if self.off:
                raise kv_params.Refused("off", f"this engine does not pull ({self.off})")
            if remote is None:
                remote = self._asking(request, params)
            if remote.offer_id in self._used:
                raise kv_params.BadParams("another request of this engine has used its offer")
            self._check_weights(request, remote)
        except kv_params.BadParams as e:
            params["do_remote_prefill"] = False
            self.pop(request.request_id)
            self._refuse(request, remote, e)
            return None
        self._asked.pop(request.request_id, None)
        self._known[request.request_id] = remote
        return remote

    def _asking(self, request: "Request", params: dict[str, Any]) -> kv_params.Remote:
        """`minted` within the time for it."""
        try:
            return self.minted(request, params)
        except Asking:
            now = time.monotonic()
            if now < self._asked.setdefault(request.request_id, now) + ASK_SECONDS:
                raise
            why = f"no answer within {ASK_SECONDS:.0f} s"
            raise kv_params.NoPeer(str(params["remote_bootstrap_addr"]), why) from None

    def give_up(self, request: "Request", remote: kv_params.Remote, why: str) -> None:
        """The prompt is prefilled here, and its offer is released."""
        self.pop(request.request_id)
        if request.kv_transfer_params is not None:
            request.kv_transfer_params["do_remote_prefill"] = False
        self._refuse(request, None, kv_params.NoPeer(remote.engine, why))
        self.use(remote)
        self._release(remote.offer)

    def minted(self, request: "Request", params: dict[str, Any]) -> kv_params.Remote:
        """The offer that a router has named, and that the prefill engine makes when it begins the prompt. Its fingerprints are
        computed here; if those of the prefill engine differ, the load fails."""
        transfer = kv_params.transfer(params)
        address, engine = params.get("remote_bootstrap_addr"), params.get("remote_engine_id")
        if not isinstance(address, str) or transfer is None:
            raise kv_params.BadParams("the request has a transfer_id and no remote_bootstrap_addr")
        peer = self.peers.get(address, engine if isinstance(engine, str) else None)
        prompt = kv_params.prompt_fingerprint(request, request.num_prompt_tokens)
        if prompt is None:
            raise kv_params.BadParams("a prompt without token ids cannot be loaded while it is computed")
        try:
            fingerprints = self._weights_of(request) | {kv_params.PROMPT: prompt}
        except Unknown as e:
            raise kv_params.BadParams(str(e)) from e
        offer_id, offer = kv_params.minted(
            transfer,
            engine=peer.engine,
            incarnation=peer.incarnation,
            ranks=peer.ranks,
            request=request.request_id,
            tokens=request.num_prompt_tokens,
            fingerprints=fingerprints,
            seal_keys=self._seal_keys,
        )
        return kv_params.Remote(offer_id, offer, request.num_prompt_tokens, fingerprints, peer.engine, awaited=True)

    def _check_prompt(self, request: "Request", remote: kv_params.Remote) -> None:
        prompt = remote.fingerprints.get(kv_params.PROMPT)
        if prompt is None:
            raise kv_params.Refused("prompt", "its offer has no prompt fingerprint")
        if request.num_prompt_tokens < remote.tokens or kv_params.prompt_fingerprint(request, remote.tokens) != prompt:
            raise kv_params.Refused("prompt", "its offer belongs to another prompt")

    def _check_weights(self, request: "Request", remote: kv_params.Remote) -> None:
        try:
            here = self._weights_of(request)
        except Unknown as e:
            raise kv_params.Refused(kv_params.ADAPTER, str(e)) from e
        there = remote.fingerprints
        if there.get(kv_params.WEIGHTS) != here[kv_params.WEIGHTS]:
            raise kv_params.Refused(
                "weights",
                f"its KV was computed with other weights ({there.get(kv_params.WEIGHTS)!r:.80} there, "
                f"{here[kv_params.WEIGHTS]!r} here); start both engines with the same weights",
            )
        if there.get(kv_params.ADAPTER) != here.get(kv_params.ADAPTER):
            raise kv_params.Refused(
                "adapter", "its KV was computed with another LoRA adapter, or with other weights of it, or without one"
            )

    def _refuse(self, request: "Request", remote: kv_params.Remote | None, error: kv_params.BadParams) -> None:
        """Counts and logs a refused offer, and releases it, so that it does not fill the prefill engine's memory."""
        self._stats.refused()
        line = f"kvferry: request {request.request_id} is prefilled here: {error}"
        # Quoted input of a client would make each line a kind of its own.
        kind: Any = re.split(r"[\"'`(0-9]", str(error), maxsplit=1)[0]
        if isinstance(error, kv_params.NoPeer):
            kind = error.key
        if remote is None or not isinstance(error, kv_params.Refused):
            return self._repeats.log(logger.warning, kind, line)
        engine, part = remote.engine, error.part
        self._stats.mismatch(part)
        self._repeats.log(logger.warning, (engine, kind), f"{line} (from engine {engine})")
        if remote.offer_id not in self._used:
            self.use(remote)
            self._release(remote.offer)
        if part not in (kv_params.WEIGHTS, kv_params.ADAPTER):
            # Clients and routers cause other mismatches, request by request.
            return
        if len(self._refusals) >= REMEMBERED:
            self._refusals.clear()
        refused = self._refusals[engine, part] = self._refusals.get((engine, part), 0) + 1
        if refused == MISMATCHES:
            self._repeats.log(
                logger.error,
                ("pair", engine, part),
                f"kvferry: the last {refused} offers of engine {engine} were refused ({part}): each of their prompts is "
                "prefilled twice until both engines run with the same weights",
            )
