"""The scheduler side: decides which requests are loaded, from which offers and into which blocks, and which are offered.

It owns no thread and no connection; its decisions travel to the workers with the step. A request is loaded at most once.
A prompt that cannot be loaded is prefilled here.
"""

import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import KVCacheConfig

from kvferry import _native
from kvferry.vllm import params as kv_params
from kvferry.vllm import pool
from kvferry.vllm.guard import logger
from kvferry.vllm.messages import GroupBlocks, Handshake, Load, Meta, Offering, Restarted
from kvferry.vllm.options import Options
from kvferry.vllm.stats import KvFerryStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

# Used offers to remember: a second request with the same offer (parallel sampling, a retry) is prefilled here.
REMEMBERED = 1 << 16
# The block id that means "no block".
NULL_BLOCK = 0
# Only prefills with these statuses are offered.
OFFERED = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


@dataclass
class Waiting:
    """A load that some ranks have not reported yet."""

    # The prompt tokens of the load, from `first` to `end` (exclusive).
    first: int
    end: int
    # With one group: the first token of each local block. Empty with several groups.
    blocks: dict[int, int]
    # First token that is known to be missing.
    missing: int | None = None


@dataclass
class Todo:
    """Messages for the workers in the next step."""

    offerings: list[Offering] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)


def _fingerprint(request: "Request", tokens: int) -> str | None:
    """The fingerprint of the first `tokens` tokens. `None`: the prompt has no token ids (embeddings)."""
    if request.prompt_token_ids is None:
        return None
    lora = getattr(request.lora_request, "lora_name", None)
    # Images and other media: their placeholder tokens are all equal, so their identifiers count too.
    seen = [f"{f.identifier}@{f.mm_position.offset}" for f in getattr(request, "mm_features", None) or ()]
    return kv_params.fingerprint(request.prompt_token_ids[:tokens], *([lora] if lora else []), *seen)


class SchedulerSide:
    """The scheduler side of one engine."""

    def __init__(self, config: "VllmConfig", kv_cache_config: KVCacheConfig) -> None:
        transfer = config.kv_transfer_config
        assert transfer is not None
        self._engine = str(transfer.engine_id)
        self._offers_here = transfer.kv_role in ("kv_producer", "kv_both")
        self._may_pull = transfer.kv_role in ("kv_consumer", "kv_both")
        self._pulls_here = self._may_pull
        self._handshakes: dict[int, Handshake] = {}
        self._tp_size = config.parallel_config.tensor_parallel_size
        self._group_ids = pool.transfer_groups(kv_cache_config)
        self._block_tokens = {g: kv_cache_config.kv_cache_groups[g].kv_cache_spec.block_size for g in self._group_ids}
        self._one_group = len(kv_cache_config.kv_cache_groups) == 1
        parallel = config.parallel_config
        self._world = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        self._windows = any(pool.windowed(kv_cache_config.kv_cache_groups[g].kv_cache_spec) for g in self._group_ids)
        self._ranks: list[tuple[int, str, str]] = []
        self._seal_keys = Options.of(config).keys()
        self._incarnation: str | None = None
        self._todo = Todo()
        # Names are numbered as they are minted, and the workers enter them in this order. From the clock in milliseconds, so
        # that numbers ascend even if this side restarts alone.
        self._numbers = itertools.count(time.time_ns() // 1_000_000)
        # For requests that were looked up and not yet admitted: the offer, and the tokens that the last look-up found here.
        self._remotes: dict[str, kv_params.Remote] = {}
        self._local: dict[str, int] = {}
        self._used: OrderedDict[str, None] = OrderedDict()
        self._waiting: dict[str, Waiting] = {}
        self.stats = KvFerryStats()

    # ---- the handshake ------------------------------------------------------------------------------------------------

    def ranks(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Receives the workers' handshakes. Under `MultiConnector` they may come from another connector."""
        ours = [m for m in metadata.values() if isinstance(m, Handshake)]
        if len(ours) != len(metadata):
            logger.error(
                "kvferry: the workers' handshakes come from another connector, so nothing is offered; "
                "list KvFerryConnector first in MultiConnector's connectors"
            )
            return
        self._shake_hands(ours)

    def _shake_hands(self, new: list[Handshake]) -> None:
        """Uses new handshakes in place of earlier ones of the same ranks."""
        self._handshakes |= {h.rank: h for h in new}
        ours = [self._handshakes[rank] for rank in sorted(self._handshakes)]
        self._ranks, self._incarnation, self._pulls_here = [], None, self._may_pull
        if self._pulls_here and not all(h.pulls for h in ours):
            logger.error("kvferry: some ranks cannot pull, so all prompts are prefilled here; see the errors above")
            self._pulls_here = False
        if len(ours) != self._world:
            logger.error("kvferry: %d of %d ranks sent a handshake: all prompts are prefilled here", len(ours), self._world)
            self._pulls_here = False
            return
        if not self._offers_here:
            return
        if not ours or not all(h.addr and h.incarnation for h in ours):
            logger.error("kvferry: some ranks cannot offer, so nothing is offered; see the errors above")
            return
        self._ranks = [(h.rank, str(h.incarnation), str(h.addr)) for h in ours]
        self._incarnation = _native.engine_incarnation([str(h.incarnation) for h in ours])
        logger.info("kvferry: engine %s offers, incarnation %s, %d ranks", self._engine, self._incarnation, len(ours))

    # ---- the decode side ----------------------------------------------------------------------------------------------

    def matched(self, request: "Request", computed: int) -> tuple[int, bool]:
        """The number of prompt tokens that can be loaded after the first `computed`, which are here. The engine may call it
        several times for one request."""
        if not kv_params.wants_prefill(request.kv_transfer_params):
            return 0, False
        remote = self._remote(request)
        if remote is None:
            return 0, False
        self._local[request.request_id] = computed
        tokens = min(remote.tokens, request.num_prompt_tokens)
        if tokens == request.num_prompt_tokens and self._windows:
            # The last token is computed here, and its window starts one token earlier than the next token's. Both sides would
            # leave out the block of that earlier token. Without the last token in the load, the block is requested.
            return (tokens - 1 - computed, True) if tokens - 1 > computed else (0, False)
        more = tokens - computed
        # The engine computes a prompt's last token itself, to sample from it. A load of that token alone is useless.
        if more <= (1 if tokens == request.num_prompt_tokens else 0):
            return 0, False
        return more, True

    def _remote(self, request: "Request") -> kv_params.Remote | None:
        """The request's offer, parsed once. An unusable offer is refused once, and the prompt is prefilled here."""
        known = self._remotes.get(request.request_id)
        if known is not None:
            return known
        params = request.kv_transfer_params
        assert params is not None
        try:
            remote = kv_params.remote(params, self._seal_keys)
            tokens = request.prompt_token_ids
            if not self._pulls_here:
                raise kv_params.BadParams("this engine does not pull (kv_role, or see the errors above)")
            if remote.offer_id in self._used:
                raise kv_params.BadParams("another request of this engine has used its offer")
            if remote.prompt is not None and tokens is not None:
                if len(tokens) < remote.tokens or _fingerprint(request, remote.tokens) != remote.prompt:
                    raise kv_params.BadParams("its offer belongs to another prompt")
            elif tokens is not None:
                raise kv_params.BadParams("its offer has no prompt fingerprint")
        except kv_params.BadParams as e:
            logger.warning("kvferry: request %s is prefilled here: %s", request.request_id, e)
            params["do_remote_prefill"] = False
            self.stats.refused()
            return None
        self._remotes[request.request_id] = remote
        return remote

    def allocated(self, request: "Request", blocks: "KVCacheBlocks", external: int) -> None:
        """The engine has allocated the request's blocks. If `external` is positive, the request waits from now on until its
        load is reported, even if this method fails."""
        params = request.kv_transfer_params
        if external <= 0 and not kv_params.wants_prefill(params):
            return
        request_id = request.request_id
        remote = self._remotes.get(request_id)
        first = self._local.pop(request_id, 0)
        if params is not None:
            params["do_remote_prefill"] = False
        if external > 0:
            if remote is None:
                raise RuntimeError("the request is to be loaded and has no offer")
            groups = self._wanted(blocks, first, first + external)
            self._remotes.pop(request_id)
            self._use(remote)
            self._waiting[request_id] = self._wait(groups, first, first + external)
            self._todo.loads.append(Load(request_id, remote.offer, groups))
        elif remote is not None:
            # The whole prompt is here, or another connector loads it.
            self._remotes.pop(request_id)
            self._use(remote)
            self._todo.releases.append(remote.offer)

    def give_up(self, request: "Request") -> None:
        """`allocated` failed, but the request waits until its workers report a failed load. The next look-up must not load it
        again."""
        remote = self._remotes.pop(request.request_id, None)
        if remote is not None:
            self._use(remote)
            self._todo.releases.append(remote.offer)
        self._local.pop(request.request_id, None)
        if request.kv_transfer_params:
            request.kv_transfer_params["do_remote_prefill"] = False
        self._todo.loads.append(Load(request.request_id, None))

    def _use(self, remote: kv_params.Remote) -> None:
        self._used[remote.offer_id] = None
        if len(self._used) > REMEMBERED:
            self._used.popitem(last=False)

    def _wanted(self, blocks: "KVCacheBlocks", first: int, end: int) -> list[GroupBlocks]:
        """The local blocks of the tokens from `first` to `end`, by group and position."""
        groups = []
        for gid in self._group_ids:
            tokens = self._block_tokens[gid]
            if first % tokens:
                raise RuntimeError(f"{first} tokens are here, and no block of group {gid} ends there")
            at, past = first // tokens, -(-end // tokens)
            mine = blocks.blocks[gid][at:past]
            # Blocks before a sliding window are null on both sides.
            ids = [None if b.is_null else b.block_id for b in mine]
            if len(ids) != past - at:
                raise RuntimeError(f"group {gid} has {len(ids)} blocks for {past - at} positions")
            groups.append(GroupBlocks(gid, at, ids))
        return groups

    def _wait(self, groups: list[GroupBlocks], first: int, end: int) -> Waiting:
        blocks: dict[int, int] = {}
        if self._one_group:
            (g,) = groups
            tokens = self._block_tokens[g.group]
            blocks = {b: (g.first_position + i) * tokens for i, b in enumerate(g.blocks) if b is not None}
        return Waiting(first, end, blocks)

    def output(self, output: "KVConnectorOutput") -> None:
        """Receives the workers' reports before the engine acts on them. Tokens are counted here, once for all ranks."""
        if isinstance(restarted := getattr(output, "kv_connector_worker_meta", None), Restarted):
            self._shake_hands(restarted.handshakes)
        for waiting in self._waiting.values() if output.invalid_block_ids else ():
            bad = [waiting.blocks[b] for b in output.invalid_block_ids if b in waiting.blocks]
            if bad:
                waiting.missing = min(bad if waiting.missing is None else [*bad, waiting.missing])
        for request_id in getattr(output, "failed_recving", None) or ():
            if waiting := self._waiting.get(request_id):
                waiting.missing = waiting.first
        for request_id in output.finished_recving or ():
            if waiting := self._waiting.pop(request_id, None):
                missing = waiting.end if waiting.missing is None else max(waiting.missing, waiting.first)
                self.stats.tokens(missing - waiting.first, waiting.end - missing)

    # ---- the prefill side, and the end of requests --------------------------------------------------------------------

    def finished(self, request: "Request", blocks: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """Returns whether the request's blocks are kept for a decode engine, and the params for that engine."""
        request_id, params = request.request_id, request.kv_transfer_params
        # If the request was aborted while it waited, its workers learn that from vLLM; no tokens are counted.
        self._waiting.pop(request_id, None)
        remote = self._remotes.pop(request_id, None)
        self._local.pop(request_id, None)
        if kv_params.wants_prefill(params):
            assert params is not None
            self._release(remote, params)
            params["do_remote_prefill"] = False
            return False, None
        if not kv_params.wants_decode(params) or not any(blocks):
            return False, None
        if request.status.name not in OFFERED:
            return False, None
        return self._offer(request, blocks)

    def _release(self, remote: kv_params.Remote | None, params: dict[str, Any]) -> None:
        """The request ended before its admission: releases its offer, so that its blocks are free before the lease ends."""
        if remote is None and self._pulls_here:
            try:
                remote = kv_params.remote(params, self._seal_keys)
            except kv_params.BadParams:
                return
        if remote is not None and self._pulls_here and remote.offer_id not in self._used:
            self._use(remote)
            self._todo.releases.append(remote.offer)

    def _offer(self, request: "Request", blocks: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        if self._incarnation is None:
            logger.warning(
                "kvferry: request %s asks for a remote decode, but this engine does not offer (see kv_role, or the errors "
                "above); the decode engine will prefill it again",
                request.request_id,
            )
            return False, None
        tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        groups = []
        for gid in self._group_ids:
            count = -(-tokens // self._block_tokens[gid])
            ids = blocks[gid][:count]
            if len(ids) != count:
                raise RuntimeError(f"group {gid} has {len(ids)} blocks for {count} positions")
            groups.append(GroupBlocks(gid, 0, [None if b == NULL_BLOCK else b for b in ids]))
        offer_id, offer, response = kv_params.response(
            engine=self._engine,
            request=request.request_id,
            addr=self._ranks[0][2],
            ranks=self._ranks,
            incarnation=self._incarnation,
            tokens=tokens,
            prompt=_fingerprint(request, tokens),
            tp_size=self._tp_size,
            seal_keys=self._seal_keys,
            number=next(self._numbers),
        )
        self._todo.offerings.append(Offering(request.request_id, offer_id, offer, groups))
        return True, response

    # ---- the step -----------------------------------------------------------------------------------------------------

    def meta(self) -> Meta:
        """The offers, loads and releases that the workers start in this step."""
        todo, self._todo = self._todo, Todo()
        return Meta(todo.offerings, todo.loads, todo.releases)

    def pending(self) -> bool:
        """Whether a message waits for a step; there may be no request that causes one."""
        return bool(self._todo.releases or self._todo.offerings)
