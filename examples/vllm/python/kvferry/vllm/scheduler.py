"""The scheduler side: which requests are loaded, from what, and into which blocks; and what is offered.

Owns no thread and no connection: everything that it decides travels to the workers with the step. A request is loaded at
most once; what cannot be loaded is prefilled here.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import KVCacheConfig

from kvferry import _native
from kvferry.vllm import params as kv_params
from kvferry.vllm import pool
from kvferry.vllm.guard import logger
from kvferry.vllm.messages import GroupBlocks, Handshake, Load, Meta, Offering
from kvferry.vllm.stats import KvFerryStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

# Offers that are remembered as used: a second request with the same one (parallel sampling, a retry) is prefilled here.
REMEMBERED = 1 << 16
# The block id that stands for no block.
NULL_BLOCK = 0
# A prefill that ended in another way has no prompt to hand on.
HANDED_ON = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


@dataclass
class Waiting:
    """A load that its ranks have not all reported."""

    # First prompt token that it is to bring, and the one past the last.
    first: int
    end: int
    # First token of each local block of the only group; empty when there are several.
    blocks: dict[int, int]
    # First token that is known not to have come.
    missing: int | None = None


@dataclass
class Todo:
    """What goes out with the next step."""

    offerings: list[Offering] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)


def _fingerprint(request: "Request", tokens: int) -> str | None:
    """Names what the first tokens' KV depends on; `None`: it cannot be told (embeddings)."""
    if request.prompt_token_ids is None:
        return None
    lora = getattr(request.lora_request, "lora_name", None)
    # Images and the like: their tokens are placeholders, all alike.
    seen = [f"{f.identifier}@{f.mm_position.offset}" for f in getattr(request, "mm_features", None) or ()]
    return kv_params.fingerprint(request.prompt_token_ids[:tokens], *([lora] if lora else []), *seen)


class SchedulerSide:
    """One engine."""

    def __init__(self, config: "VllmConfig", kv_cache_config: KVCacheConfig) -> None:
        transfer = config.kv_transfer_config
        assert transfer is not None
        self._engine = str(transfer.engine_id)
        self._offers_here = transfer.kv_role in ("kv_producer", "kv_both")
        self._pulls_here = transfer.kv_role in ("kv_consumer", "kv_both")
        self._tp_size = config.parallel_config.tensor_parallel_size
        self._group_ids = pool.transfer_groups(kv_cache_config)
        self._block_tokens = {g: kv_cache_config.kv_cache_groups[g].kv_cache_spec.block_size for g in self._group_ids}
        self._one_group = len(kv_cache_config.kv_cache_groups) == 1
        parallel = config.parallel_config
        self._world = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        self._windows = any(pool.windowed(kv_cache_config.kv_cache_groups[g].kv_cache_spec) for g in self._group_ids)
        self._ranks: list[dict[str, Any]] = []
        self._incarnation: str | None = None
        self._todo = Todo()
        # Offers of requests that were looked up and not yet admitted, and what the last look-up found here.
        self._remotes: dict[str, kv_params.Remote] = {}
        self._local: dict[str, int] = {}
        self._used: OrderedDict[str, None] = OrderedDict()
        self._waiting: dict[str, Waiting] = {}
        self.stats = KvFerryStats()

    # ---- who we are ---------------------------------------------------------------------------------------------------

    def ranks(self, metadata: dict[tuple[int, int], Any]) -> None:
        """What the workers said of themselves; under `MultiConnector` it may be another connector's."""
        ours = [m for m in metadata.values() if isinstance(m, Handshake)]
        if len(ours) != len(metadata):
            logger.error(
                "kvferry: the workers' handshake is another connector's: nothing is offered. "
                "List KvFerryConnector first in MultiConnector's connectors."
            )
            return
        ours.sort(key=lambda h: h.rank)
        if self._pulls_here and not all(h.pulls for h in ours):
            logger.error("kvferry: not every rank can pull: all prompts are prefilled here")
            self._pulls_here = False
        if len(ours) != self._world:
            logger.error("kvferry: %d of %d ranks are there: all prompts are prefilled here", len(ours), self._world)
            self._pulls_here = False
            return
        if not self._offers_here:
            return
        if not ours or not all(h.addr and h.incarnation for h in ours):
            logger.error("kvferry: not every rank can offer: nothing is offered")
            return
        self._ranks = [{"rank": h.rank, "incarnation": h.incarnation, "addr": h.addr} for h in ours]
        self._incarnation = _native.engine_incarnation([str(h.incarnation) for h in ours])
        logger.info("kvferry: engine %s offers, incarnation %s, %d ranks", self._engine, self._incarnation, len(ours))

    # ---- the decode side ----------------------------------------------------------------------------------------------

    def matched(self, request: "Request", computed: int) -> tuple[int, bool]:
        """How many prompt tokens can be loaded past the first `computed`, which are here. Asked again at will."""
        if not kv_params.wants_prefill(request.kv_transfer_params):
            return 0, False
        remote = self._remote(request)
        if remote is None:
            return 0, False
        self._local[request.request_id] = computed
        tokens = min(remote.tokens, request.num_prompt_tokens)
        if tokens == request.num_prompt_tokens and self._windows:
            # The last token is computed here, and may see one token more than the next one would: a block that both sides
            # would leave out as past. So it is not part of the load, and the block is asked for.
            return (tokens - 1 - computed, True) if tokens - 1 > computed else (0, False)
        more = tokens - computed
        # The engine computes a prompt's last token itself, to sample from it. A load of that one alone brings nothing.
        if more <= (1 if tokens == request.num_prompt_tokens else 0):
            return 0, False
        return more, True

    def _remote(self, request: "Request") -> kv_params.Remote | None:
        """The request's offer; read once. One that cannot be used is refused once, and the prompt prefilled here."""
        known = self._remotes.get(request.request_id)
        if known is not None:
            return known
        params = request.kv_transfer_params
        assert params is not None
        try:
            remote = kv_params.remote(params)
            tokens = request.prompt_token_ids
            if not self._pulls_here:
                raise kv_params.BadParams("this engine does not pull (kv_role, or see the errors above)")
            if remote.offer_id in self._used:
                raise kv_params.BadParams("its offer was used by another request of this engine")
            if remote.prompt is not None and tokens is not None:
                if len(tokens) < remote.tokens or _fingerprint(request, remote.tokens) != remote.prompt:
                    raise kv_params.BadParams("its offer is of another prompt")
            elif tokens is not None:
                raise kv_params.BadParams("its offer does not say of which prompt it is")
        except kv_params.BadParams as e:
            logger.warning("kvferry: request %s is prefilled here: %s", request.request_id, e)
            params["do_remote_prefill"] = False
            self.stats.refused()
            return None
        self._remotes[request.request_id] = remote
        return remote

    def allocated(self, request: "Request", blocks: "KVCacheBlocks", external: int) -> None:
        """The engine has set blocks aside; with `external` tokens the request now waits for its load, whatever happens."""
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
                raise RuntimeError("no offer is known for a request that is to be loaded")
            groups = self._wanted(blocks, first, first + external)
            self._remotes.pop(request_id)
            self._use(remote)
            self._waiting[request_id] = self._wait(groups, first, first + external)
            self._todo.loads.append(Load(request_id, remote.offer, groups))
        elif remote is not None:
            # All of the prompt is here, or another connector brings it.
            self._remotes.pop(request_id)
            self._use(remote)
            self._todo.releases.append(remote.offer)

    def give_up(self, request: "Request") -> None:
        """`allocated` failed: the request waits all the same, until its workers report that nothing came. It is not to be
        loaded when it is looked up again."""
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
        """The blocks of the tokens from `first` to `end`, by group and position."""
        groups = []
        for gid in self._group_ids:
            tokens = self._block_tokens[gid]
            if first % tokens:
                raise RuntimeError(f"{first} tokens are here, which is no end of a block of group {gid}")
            at, past = first // tokens, -(-end // tokens)
            mine = blocks.blocks[gid][at:past]
            # Blocks that a sliding window has left are null on both sides.
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
        """What the workers reported, before the engine acts on it: tokens are counted here, once for all ranks."""
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
        """Whether the request's blocks stay for a decode engine, and what to tell it."""
        request_id, params = request.request_id, request.kv_transfer_params
        # Aborted while it waited: its workers hear of it by themselves, and nothing is counted.
        self._waiting.pop(request_id, None)
        remote = self._remotes.pop(request_id, None)
        self._local.pop(request_id, None)
        if kv_params.wants_prefill(params):
            assert params is not None
            self._let_go(remote, params)
            params["do_remote_prefill"] = False
            return False, None
        if not kv_params.wants_decode(params) or not any(blocks):
            return False, None
        if request.status.name not in HANDED_ON:
            return False, None
        return self._offer(request, blocks)

    def _let_go(self, remote: kv_params.Remote | None, params: dict[str, Any]) -> None:
        """A request ended before it was admitted: the prefill engine need not wait for its lease."""
        if remote is None and self._pulls_here:
            try:
                remote = kv_params.remote(params)
            except kv_params.BadParams:
                return
        if remote is not None and self._pulls_here and remote.offer_id not in self._used:
            self._use(remote)
            self._todo.releases.append(remote.offer)

    def _offer(self, request: "Request", blocks: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        if self._incarnation is None:
            logger.warning(
                "kvferry: request %s asks for a remote decode, and this engine does not offer (kv_role, or see the errors "
                "above): it will be prefilled again where it is decoded",
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
            named = [None if b == NULL_BLOCK else b for b in ids]
            groups.append({"group": gid, "first_position": 0, "blocks": named})
        offer_id, offer, response = kv_params.response(
            engine=self._engine,
            request=request.request_id,
            addr=self._ranks[0]["addr"],
            ranks=self._ranks,
            incarnation=self._incarnation,
            groups=groups,
            tokens=tokens,
            prompt=_fingerprint(request, tokens),
            tp_size=self._tp_size,
        )
        self._todo.offerings.append(Offering(request.request_id, offer_id, offer))
        return True, response

    # ---- the step -----------------------------------------------------------------------------------------------------

    def meta(self) -> Meta:
        """What the step's workers have to start."""
        todo, self._todo = self._todo, Todo()
        return Meta(todo.offerings, todo.loads, todo.releases)

    def pending(self) -> bool:
        """Something waits for a step, and no request may be there to cause one."""
        return bool(self._todo.releases or self._todo.offerings)
