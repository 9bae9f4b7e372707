"""The scheduler side: decides which requests are loaded, from which offers and into which blocks, and which are offered.

It owns no thread and no connection; its decisions travel to the workers with the step. A request is loaded at most once.
A prompt that cannot be loaded is prefilled here.
"""

import itertools
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import KVCacheConfig

from kvferry import _native
from kvferry.vllm import bootstrap, core, pool
from kvferry.vllm import params as kv_params
from kvferry.vllm.guard import ENDING, logger
from kvferry.vllm.messages import GroupBlocks, Handshake, Hold, Load, Meta, News, Offering
from kvferry.vllm.options import Options
from kvferry.vllm.peers import Asking, Peers
from kvferry.vllm.remotes import Remotes
from kvferry.vllm.repeats import Repeats
from kvferry.vllm.stats import KvFerryStats
from kvferry.vllm.transfers import NULL_BLOCK, Growing, Transfers
from kvferry.vllm.weights import Unknown

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

# The library's default for the time that a prefill may wait in its queue, in seconds.
QUEUED = 60.0
# How long an idle step waits for the answer of a bootstrap endpoint, in seconds.
ANSWER_WAIT = 0.002
# Why some engines do not offer running prefills.
ZEROES = "caches of mixed precision are offered only when the prefill has finished"
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
class Prefill:
    """A request for a remote decode."""

    # Fingerprints of the weights at its arrival; `None`: not known.
    weights: dict[str, str] | None
    # Number of its prompt tokens.
    tokens: int
    # Number of its tokens that were in the prefix cache at its first look-up; `None` before.
    cached: int | None = None
    # Whether a router has named its offer: the decode engine knows no other one.
    named: bool = False


@dataclass
class Awaited:
    """An offer whose prefill may not have begun."""

    offer_id: str
    # Ranks whose claims wait for it.
    ranks: int
    # When this engine gives up and prefills the prompt itself, by `time.monotonic`.
    until: float
    # Whether a claim has ended without an offer.
    over: bool = False


@dataclass
class Todo:
    """Messages for the workers in the next step."""

    offerings: list[Offering] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)

    def any(self) -> bool:
        """Whether there is a message."""
        return bool(self.offerings or self.loads or self.releases or self.holds)


def replica_of(parallel: Any) -> int:
    """The number of this data-parallel replica at its API server. A server with one replica knows it as 0, and so does one whose
    load balancer is on another host."""
    replica = getattr(parallel, "data_parallel_index", 0)
    if getattr(parallel, "data_parallel_external_lb", False):
        return 0
    if getattr(parallel, "data_parallel_hybrid_lb", False):
        return replica % max(getattr(parallel, "data_parallel_size_local", 1), 1)
    return replica


class NotOffered(Exception):
    """A prefill engine that does not offer a prompt, or not in time."""


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
        self._one_host = getattr(parallel, "nnodes", 1) == 1
        self._ranks: list[tuple[int, str, str]] = []
        options = Options.of(config)
        self._seal_keys = options.keys()
        self._bootstrap: bootstrap.Server | None = None
        self._replica = replica_of(parallel)
        if options.bootstrap_port is not None:
            replica = getattr(parallel, "data_parallel_index", 0)
            port = options.bootstrap_port + replica if options.bootstrap_port else 0
            self._bootstrap = bootstrap.Server(options.host, port, replica)
        # Blocks of these caches are zeroed before their next use, in some runners before the hook that ends their offers.
        self._zeroes = bool(getattr(kv_cache_config, "needs_kv_cache_zeroing", False))
        windows = {g for g in self._group_ids if pool.windowed(kv_cache_config.kv_cache_groups[g].kv_cache_spec)}
        self.windows = bool(windows)
        self.transfers = Transfers(self._block_tokens, windows, self._open_name, self._unchanged)
        self._core = core.Core(core.find())
        self._weights = ""
        # Why nothing is transferred; empty: transfers work.
        self._off = ""
        self._repeats = Repeats()
        self._incarnation: str | None = None
        self._todo = Todo()
        # Names are numbered as they are minted, and the workers enter them in this order. From the clock in milliseconds, so
        # that numbers ascend even if this side restarts alone.
        self._numbers = itertools.count(time.time_ns() // 1_000_000)
        # For requests that were looked up and not yet admitted: the tokens that the last look-up found here.
        self._local: dict[str, int] = {}
        # Awaited offers, by request that is not yet admitted.
        self._awaited: dict[str, Awaited] = {}
        self._queued = options.queued if options.queued is not None else QUEUED
        # Requests whose prefill engine has not answered yet.
        self._asking: dict[str, Request] = {}
        self._waiting: dict[str, Waiting] = {}
        self._prefills: dict[str, Prefill] = {}
        # The gauges of this side and of the ranks are sent with a step. After the start, one step is made for them.
        self._unsent_gauges = False
        self.stats = KvFerryStats()
        peers = Peers(self._seal_keys, options.dial)
        release = lambda offer: self._todo.releases.append(offer)  # noqa: E731
        self._remotes = Remotes(self._seal_keys, peers, self.stats, self._repeats, self._weights_of, release)
        self._remotes.off = "" if self._pulls_here else "see kv_role"

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
        self._settle(new)
        self._remotes.off = "" if self._pulls_here else self._off or "see kv_role"
        if self._bootstrap is not None:
            entry = bootstrap.entry(
                engine=self._engine,
                incarnation=self._incarnation,
                ranks=self._ranks,
                seal_keys=self._seal_keys,
                pulls=self._pulls_here,
                replica=self._replica,
            )
            self._bootstrap.set(entry)
            logger.info("kvferry: engine %s answers GET /query at port %d", self._engine, self._bootstrap.port)

    def _settle(self, new: list[Handshake]) -> None:
        self._unsent_gauges = True
        self._handshakes |= {h.rank: h for h in new}
        ours = [self._handshakes[rank] for rank in sorted(self._handshakes)]
        self._ranks, self._incarnation, self._pulls_here = [], None, self._may_pull
        self._weights = next((h.weights for h in ours), "")
        self._off = next((h.off for h in ours if h.off), "")
        self.stats.up("scheduler", self._off)
        if self._off:
            # The rank's own line says more.
            logger.warning("kvferry: nothing is transferred (%s): all prompts are prefilled here", self._off)
            self._pulls_here = False
            return
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

    # ---- arrival ------------------------------------------------------------------------------------------------------

    def arrived(self, request: "Request") -> None:
        """The engine has heard of a request, which may wait in its queue for long. An offer is claimed now, so that its lease
        does not run out meanwhile."""
        params = request.kv_transfer_params
        if kv_params.wants_decode(params):
            try:
                weights = self._weights_of(request)
            except Unknown as e:
                self._repeats.log(logger.warning, "unknown", f"kvferry: request {request.request_id} is not offered: {e}")
                weights = None
            prefill = self._prefills[request.request_id] = Prefill(weights, request.num_prompt_tokens)
            self._arrived_with_transfer(request, prefill)
        elif kv_params.wants_prefill(params):
            self._hold(request)

    def _hold(self, request: "Request") -> None:
        try:
            if (remote := self._remotes.get(request)) is not None:
                self._claim(request, remote)
        except Asking:
            self._asking[request.request_id] = request

    def _claim(self, request: "Request", remote: kv_params.Remote) -> None:
        self._todo.holds.append(Hold(remote.offer_id, remote.offer, remote.awaited))
        if remote.awaited:
            until = time.monotonic() + self._queued
            self._awaited[request.request_id] = Awaited(remote.offer_id, self._world, until)

    def _has_begun(self, request: "Request", remote: kv_params.Remote) -> bool:
        """Whether the prefill of an awaited offer has begun. A request takes no blocks before that. Otherwise two engines with
        full pools could wait for each other, and the blocks would be idle while the prefill waits in its queue. Raises
        `NotOffered` if there is nothing to wait for."""
        if not remote.awaited:
            return True
        awaited = self._awaited.get(request.request_id)
        if awaited is None:
            self._claim(request, remote)
            return False
        if awaited.over:
            raise NotOffered("it does not offer the prompt")
        if awaited.ranks > 0 and time.monotonic() > awaited.until:
            raise NotOffered(f"its prefill has not begun within {self._queued:.0f} s")
        return awaited.ranks <= 0

    def _arrived_with_transfer(self, request: "Request", prefill: Prefill) -> None:
        """A router may have sent the request to a decode engine at the same time. That engine waits for the offer."""
        try:
            transfer = kv_params.transfer(request.kv_transfer_params)
        except kv_params.BadParams as e:
            self._repeats.log(logger.warning, "transfer", f"kvferry: request {request.request_id} is not offered: {e}")
            prefill.named = True
            return
        if transfer is not None:
            prefill.named = True
            self.transfers.add(request, transfer, _native.transfer_offer(transfer))

    def _weights_of(self, request: "Request") -> dict[str, str]:
        """The fingerprints of the weights that a request's KV is computed from. Raises `Unknown`."""
        updates = self._core.updates
        weights = {kv_params.WEIGHTS: f"{self._weights}+{updates}" if updates else self._weights}
        if request.lora_request is not None:
            weights[kv_params.ADAPTER] = self._core.adapters.fingerprint(request.lora_request)
        return weights

    def kept_tokens(self, request_id: str, processed: int) -> int:
        """The engine frees the blocks that no token after the first `processed` ones attends to. The decode side computes a
        prompt's last token itself, and its window starts one token earlier than the next token's: that block stays."""
        prefill = self._prefills.get(request_id)
        return processed if prefill is None else min(processed, max(prefill.tokens - 1, 0))

    # ---- the decode side ----------------------------------------------------------------------------------------------

    def matched(self, request: "Request", computed: int) -> tuple[int | None, bool]:
        """The number of prompt tokens that can be loaded after the first `computed`, which are here; `None`: not known yet. The
        engine may call it several times for one request."""
        if (prefill := self._prefills.get(request.request_id)) is not None and prefill.cached is None:
            prefill.cached = computed
        self.transfers.looked_up(request.request_id, computed)
        if not kv_params.wants_prefill(request.kv_transfer_params):
            return 0, False
        try:
            remote = self._remotes.get(request)
        except Asking:
            return None, False
        if remote is None:
            self._local.pop(request.request_id, None)
            self._awaited.pop(request.request_id, None)
            return 0, False
        tokens = min(remote.tokens, request.num_prompt_tokens)
        # The engine computes a prompt's last token itself, to sample from it. A load of that token alone is useless.
        last = 1 if tokens == request.num_prompt_tokens else 0
        if tokens - computed <= last:
            return 0, False
        try:
            if not self._has_begun(request, remote):
                return None, False
        except NotOffered as e:
            del self._awaited[request.request_id]
            # It may have restarted.
            self._remotes.peers.forget(remote.engine)
            self._remotes.give_up(request, remote, str(e))
            return 0, False
        self._local[request.request_id] = computed
        # The last token's window starts one token earlier than the next token's (see `kept_tokens`). Without the last token in
        # the load, the engine wants the block of that earlier token.
        return tokens - computed - (last if self.windows else 0), True

    def allocated(self, request: "Request", blocks: "KVCacheBlocks", external: int) -> None:
        """The engine has allocated the request's blocks. If `external` is positive, the request waits from now on until its
        load is reported, even if this method fails."""
        params = request.kv_transfer_params
        if external <= 0 and not kv_params.wants_prefill(params):
            return
        request_id = request.request_id
        remote = self._remotes.peek(request_id)
        first = self._local.pop(request_id, 0)
        if params is not None:
            params["do_remote_prefill"] = False
        if external > 0:
            if remote is None:
                raise RuntimeError("the request is to be loaded and has no offer")
            groups = self._wanted(blocks, first, first + external)
            self._remotes.pop(request_id)
            self._awaited.pop(request_id, None)
            self._remotes.loads(remote)
            self._waiting[request_id] = self._wait(groups, first, first + external)
            self._todo.loads.append(Load(request_id, remote.offer, groups, remote.awaited))
        elif remote is not None:
            # The whole prompt is here, or another connector loads it.
            self._remotes.pop(request_id)
            self._awaited.pop(request_id, None)
            self._remotes.use(remote)
            self._todo.releases.append(remote.offer)

    def give_up(self, request: "Request") -> None:
        """`allocated` failed, but the request waits until its workers report a failed load. The next look-up must not load it
        again."""
        self._awaited.pop(request.request_id, None)
        remote = self._remotes.pop(request.request_id)
        if remote is not None:
            self._remotes.use(remote)
            self._todo.releases.append(remote.offer)
        self._local.pop(request.request_id, None)
        if request.kv_transfer_params:
            request.kv_transfer_params["do_remote_prefill"] = False
        self._todo.loads.append(Load(request.request_id, None))

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
        if isinstance(news := getattr(output, "kv_connector_worker_meta", None), News):
            if news.handshakes:
                self._shake_hands(news.handshakes)
            awaited = {a.offer_id: a for a in self._awaited.values()} if news.begun or news.over else {}
            for offer_id in news.begun:
                if offer_id in awaited:
                    awaited[offer_id].ranks -= 1
            for offer_id in news.over:
                if offer_id in awaited:
                    awaited[offer_id].over = True
            for engine in news.failed:
                self._remotes.peers.forget(engine)
            if wedged := [r for r in news.wedged if self._waiting.pop(r, None) is not None]:
                logger.error("kvferry: %s end with an error: their loads will never be quiet", ", ".join(wedged))
                self._core.fail(wedged)
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
        self._local.pop(request_id, None)
        self._asking.pop(request_id, None)
        self._awaited.pop(request_id, None)
        prefill = self._prefills.pop(request_id, None)
        loading = kv_params.wants_prefill(params)
        if loading:
            assert params is not None
            self._remotes.end(request, params)
            params["do_remote_prefill"] = False
        self._remotes.pop(request_id)
        if prefill is not None and prefill.named:
            return self._finished_growing(request, prefill)
        if loading:
            return False, None
        if not kv_params.wants_decode(params) or not any(blocks):
            return False, None
        if request.status.name not in OFFERED:
            return False, None
        if self._core.stopping():
            # The decode engine prefills it again. Otherwise the offer would keep this process from exiting.
            return False, None
        weights = self._offered_weights(request, prefill)
        return self._offer(request, blocks, weights) if weights is not None else (False, None)

    # ---- offers that grow ---------------------------------------------------------------------------------------------

    def _open_name(self, growing: Growing) -> str | None:
        """The name of the offer of a prefill that begins; `None`: it is not offered."""
        request = growing.request
        prefill = self._prefills.get(request.request_id)
        prompt = kv_params.prompt_fingerprint(request, request.num_prompt_tokens)
        if prefill is None or prompt is None or self._core.stopping() or not self._can_offer(request):
            return None
        if self._zeroes:
            self._repeats.log(logger.warning, "zeroes", f"kvferry: request {request.request_id} is not offered: {ZEROES}")
            return None
        weights = self._offered_weights(request, prefill)
        if weights is None:
            return None
        _, name = kv_params.minted(
            growing.transfer,
            engine=self._engine,
            incarnation=self._incarnation or "",
            ranks=self._ranks,
            request=request.request_id,
            tokens=request.num_prompt_tokens,
            fingerprints=weights | {kv_params.PROMPT: prompt},
            seal_keys=self._seal_keys,
        )
        return name

    def _unchanged(self, growing: Growing) -> bool:
        return self._is_unchanged(growing.request, self._prefills.get(growing.request.request_id))

    def _finished_growing(self, request: "Request", prefill: Prefill) -> tuple[bool, dict[str, Any] | None]:
        growing = self.transfers.finished(request)
        if growing is None:
            return False, None
        # From here on the blocks must stay, whatever fails: the offer is open.
        try:
            if request.status.name in OFFERED and growing.complete and self._is_unchanged(request, prefill):
                response = self._response(request, request.num_prompt_tokens, growing.offer)
                self.transfers.keep(growing)
                return True, response
        except ENDING:
            raise
        except BaseException:
            logger.exception("kvferry: request %s is not offered any more", request.request_id)
        self.transfers.end(growing)
        return True, None

    def _is_unchanged(self, request: "Request", prefill: Prefill | None) -> bool:
        """Whether a prefill goes on with the weights that it began with, on ranks that its offer names."""
        if prefill is None or self._incarnation is None:
            return False
        return self._offered_weights(request, prefill) is not None

    def _offered_weights(self, request: "Request", prefill: Prefill | None) -> dict[str, str] | None:
        """The fingerprints of the weights that a finished prefill was computed from; `None`: it is not known which."""
        try:
            now = self._weights_of(request)
        except Unknown as e:
            why = str(e)
        else:
            lora = request.lora_request
            stale = self._core.stale or (lora is not None and self._core.adapters.is_stale(lora))
            if prefill is None or now != prefill.weights:
                why = "weights were replaced while it was computed"
            elif stale and prefill.cached != 0:
                why = "it begins with blocks of the prefix cache, which may be of weights that were replaced; reset the cache"
            else:
                return now
        self._repeats.log(logger.warning, "weights", f"kvferry: request {request.request_id} is not offered: {why}")
        return None

    def _offer(
        self, request: "Request", blocks: tuple[list[int], ...], weights: dict[str, str]
    ) -> tuple[bool, dict[str, Any] | None]:
        if not self._can_offer(request):
            return False, None
        tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        groups = []
        for gid in self._group_ids:
            count = -(-tokens // self._block_tokens[gid])
            ids = blocks[gid][:count]
            if len(ids) != count:
                raise RuntimeError(f"group {gid} has {len(ids)} blocks for {count} positions")
            groups.append(GroupBlocks(gid, 0, [None if b == NULL_BLOCK else b for b in ids]))
        prompt = kv_params.prompt_fingerprint(request, tokens)
        fingerprints = weights | ({kv_params.PROMPT: prompt} if prompt is not None else {})
        offer_id, name = _native.name_offer(
            engine=self._engine,
            incarnation=self._incarnation or "",
            ranks=self._ranks,
            tokens=tokens,
            request=request.request_id[:256],
            fingerprints=fingerprints,
            seal_keys=self._seal_keys,
            number=next(self._numbers),
        )
        self._todo.offerings.append(Offering(request.request_id, offer_id, name, groups))
        return True, self._response(request, tokens, name)

    def _can_offer(self, request: "Request") -> bool:
        if self._incarnation is None:
            self._repeats.log(
                logger.warning,
                "no offers",
                f"kvferry: request {request.request_id} asks for a remote decode, but this engine does not offer (see kv_role, "
                "or the errors above); the decode engine will prefill it again",
            )
        return self._incarnation is not None

    def _response(self, request: "Request", tokens: int, name: str) -> dict[str, Any]:
        return kv_params.response(
            engine=self._engine,
            request=request.request_id,
            addr=self._ranks[0][2],
            tokens=tokens,
            tp_size=self._tp_size,
            name=name,
        )

    # ---- the step -----------------------------------------------------------------------------------------------------

    def meta(self, output: "SchedulerOutput") -> Meta:
        """The messages that the workers receive with this step."""
        stopping, scheduled = self._core.stopping(), output.total_num_scheduled_tokens
        # First: offers whose blocks are used again end in this step, whatever fails.
        self.transfers.step(output)
        self._ask()
        if scheduled or self._todo.any() or self.transfers.todo.any() or self._unsent_gauges or stopping:
            self._core.busy()
        else:
            # A rank on another host cannot tell that a load has ended.
            loading = len(self._waiting) + sum(a.ranks > 0 for a in self._awaited.values())
            until = min((a.until for a in self._awaited.values() if a.ranks > 0), default=math.inf)
            self._core.wait(loading if self._one_host else 0, max(until - time.monotonic(), 0.1))
            if self._asking:
                self._remotes.peers.wait(ANSWER_WAIT)
        self._unsent_gauges = False
        todo, self._todo = self._todo, Todo()
        growing = self.transfers.take()
        rings = todo.offerings or todo.loads or todo.holds or growing["openings"] or growing["held"]
        alarm = self._core.alarm() if rings else None
        return Meta(todo.offerings, todo.loads, todo.releases, todo.holds, stopping=stopping, alarm=alarm, **growing)

    def _ask(self) -> None:
        """Claims the offers of engines whose endpoints have answered."""
        for request in list(self._asking.values()):
            del self._asking[request.request_id]
            try:
                if kv_params.wants_prefill(request.kv_transfer_params) and request.request_id not in self._remotes:
                    self._hold(request)
            except ENDING:
                raise
            except BaseException:
                # Its look-up tries again.
                logger.exception("kvferry: request %s: its offer is not claimed", request.request_id)

    def pending(self) -> bool:
        """Whether a message waits for a step; there may be no request that causes one."""
        todo = self._todo
        return bool(todo.releases or todo.offerings or self.transfers.todo.any() or self._unsent_gauges)

    def close(self) -> None:
        """The engine ends."""
        if self._bootstrap is not None:
            self._bootstrap.close()
