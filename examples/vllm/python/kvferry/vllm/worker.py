"""The worker side: one producer and one consumer on this rank's KV memory.

Promises to vLLM: each load given to this rank is reported exactly once, when nothing writes its blocks any more. An aborted
load reports no invalid blocks. Each offering given to this rank is reported once, when its blocks may be used again. Every
failure becomes one of these reports.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.kv_cache_interface import KVCacheConfig

from kvferry import _native
from kvferry.vllm import pool, weights
from kvferry.vllm.guard import ENDING, StartFailed, logger
from kvferry.vllm.messages import Handshake, Hold, Load, Meta, News
from kvferry.vllm.offers import Offers
from kvferry.vllm.options import Options
from kvferry.vllm.repeats import Repeats
from kvferry.vllm.stats import KvFerryStats
from kvferry.vllm.wake import Bell

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Limit of `shutdown` in seconds, for the consumer and for the producer each.
CLOSE = 0.4
# The same before sleep. vLLM unmaps GPU memory afterwards, so a copy that is still running must end first.
CLOSE_TO_SLEEP = 5.0
# How often the bell's thread checks whether a prefill has begun, in seconds: 200 checks a second take 0.5 % of a core.
HOLD_LOOK = 0.005
# Missing before vLLM 0.33: the engine does not tell a connector that it is going to sleep.
SLEEP_IS_ANNOUNCED = hasattr(KVConnectorBase_V1, "unregister_kv_caches")


def start_failed(config: "VllmConfig", error: BaseException) -> None:
    """Handles an error at the start as the operator wants. Raises `StartFailed`, or logs."""
    given = getattr(config.kv_transfer_config, "kv_connector_extra_config", None) or {}
    if given.get("on_start_failure", "exit") == "off":
        logger.error("kvferry is off on this engine, which prefills every prompt itself: %s", error)
        return
    line = (
        f"kvferry cannot start: {error}. Correct this, or set on_start_failure to off in kv_connector_extra_config: the engine "
        "then prefills every prompt itself"
    )
    logger.error(line)
    raise StartFailed(line) from error


@dataclass
class Running:
    """A running pull."""

    load: Load
    aborted: bool = False


@dataclass
class Report:
    """Ids of requests to report to vLLM in one step."""

    sent: set[str]
    received: set[str]
    failed: set[str]


class WorkerSide:
    """The worker side of one rank."""

    def __init__(self, config: "VllmConfig", kv_cache_config: KVCacheConfig) -> None:
        transfer = config.kv_transfer_config
        assert transfer is not None
        self._config = config
        self._kv_cache_config = kv_cache_config
        self._offers_here = transfer.kv_role in ("kv_producer", "kv_both")
        self._pulls_here = transfer.kv_role in ("kv_consumer", "kv_both")
        # vLLM's report of invalid blocks has no groups: with several cache groups a load fails as a whole.
        self._one_group = len(kv_cache_config.kv_cache_groups) == 1
        self._producer: _native.Producer | None = None
        self._consumer: _native.Consumer | None = None
        self._rank = 0
        self._registered: dict[str, torch.Tensor] = {}
        # The device of a cache in GPU memory.
        self._gpu: torch.device | None = None
        self._asleep = False
        # Whether something may still use the memory from before a sleep: this rank must not start again.
        self._lost = False
        self._changed = False
        self._pulls: dict[int, Running] = {}
        self._by_request: dict[str, int] = {}
        # Awaited offers whose claims wait, and the ids of those that have stopped waiting since the last news.
        self._holds: dict[str, _native.Hold] = {}
        self._begun: list[str] = []
        self._over: list[str] = []
        # Engines from which a load has failed since the last news.
        self._failed_peers: set[str] = set()
        self._report = Report(set(), set(), set())
        self._invalid: set[int] = set()
        self.stats = KvFerryStats()
        self._last_gauges: tuple[int, ...] = ()
        # Why this rank does not work; empty: it does.
        self._off = ""
        self._weights = ""
        self._draining = False
        # Ring when an offer is freed, and when a load has ended.
        self._bell: Bell | None = None
        self._load_bell: Bell | None = None
        # Wedged pulls that the scheduler side knows of.
        self._told: set[int] = set()
        self._repeats = Repeats()
        drafts = getattr(config, "speculative_config", None) is not None
        sent = lambda request: self._report.sent.add(request)  # noqa: E731
        self.offers = Offers(self.stats, self._repeats, sent, self._stream, drafts)

    # ---- registration -------------------------------------------------------------------------------------------------

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Starts the producer and the consumer on the engine's memory.

        Raises `StartFailed`, unless the operator wants the engine to prefill every prompt itself then."""
        self._registered = dict(kv_caches)
        if self._producer is None and self._consumer is None:
            self._start_or_say()

    def _start_or_say(self) -> None:
        try:
            self._start(self._registered)
        except ENDING:
            raise
        except pool.UnsupportedKind as e:
            # No setting can change that.
            self._turn_off(e.reason)
            logger.warning("kvferry is off on this engine, which prefills every prompt itself: %s", e)
        except BaseException as e:
            self._turn_off(getattr(e, "reason", "start_failed"))
            self._close(CLOSE)
            start_failed(self._config, e)
        else:
            self.stats.up(str(self._rank), "")

    def _turn_off(self, reason: str) -> None:
        self._off = reason
        self.stats.up(str(self._rank), reason)

    def _start(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        options = Options.of(self._config)
        settings = options.native()
        self._awaited_deadline = options.awaited_deadline()
        cache = pool.describe(kv_caches, self._kv_cache_config, pool.layout_name(self._config))
        if cache.on_gpu and not SLEEP_IS_ANNOUNCED and getattr(self._config.model_config, "enable_sleep_mode", False):
            raise pool.Unsupported(
                "sleep mode unmaps GPU memory, and this version of vLLM does not tell connectors: use vLLM 0.33 or newer, or "
                "start without --enable-sleep-mode"
            )
        memory = self._memory(cache, kv_caches)
        self._gpu = cache.device if cache.on_gpu else None
        self._weights = weights.of_engine(self._config)
        me = pool.identity(self._config, kv_caches, cache, options.model_id, self._weights)
        tp, pp = get_tp_group(), get_pp_group()
        self._rank = pp.rank_in_group * tp.world_size + tp.rank_in_group
        if self._offers_here:
            replica = getattr(self._config.parallel_config, "data_parallel_index", 0)
            listen = options.listen(self._rank, tp.world_size * pp.world_size, replica)
            self._producer = _native.Producer(me, memory, settings, listen, options.reached_at())
            self._addr = self._producer.addr
            self.offers.producer = self._producer
        if self._pulls_here:
            self._consumer = _native.Consumer(me, memory, settings)
        logger.info(
            "kvferry: rank %d is up: lanes %s; %s; memory: %s; weights: %s",
            self._rank,
            ", ".join(f"{lane} ({why})" if why else lane for lane, why in settings.lanes()),
            f"offers at {self._addr}, incarnation {self._producer.incarnation}" if self._producer else "offers nothing",
            memory.place,
            self._weights,
        )

    def _memory(self, cache: pool.Cache, kv_caches: dict[str, torch.Tensor]) -> _native.Pool:
        try:
            return _native.Pool(cache.segments, cache.groups, list(kv_caches.values()), cache.on_gpu)
        except RuntimeError as e:
            # The driver cannot be used, or refuses the memory: the text says why.
            raise pool.Unsupported(f"the cache is on {cache.device}: {e}") from e

    def _stream(self) -> int | None:
        """The compute stream of the calling thread, if the cache is in GPU memory."""
        return None if self._gpu is None else torch.cuda.current_stream(self._gpu).cuda_stream

    def handshake(self) -> Handshake:
        """This rank's handshake for the scheduler side."""
        producer = self._producer
        return Handshake(
            rank=self._rank,
            addr=self._addr if producer else None,
            incarnation=producer.incarnation if producer else None,
            pulls=self._consumer is not None,
            weights=self._weights,
            off=self._off,
        )

    # ---- the start of a step ------------------------------------------------------------------------------------------

    def start(self, meta: Meta) -> None:
        """Starts the scheduler side's offers, loads and releases, once."""
        loads, releases, holds = meta.loads, meta.releases, meta.holds
        # In one process this may be the scheduler's own object. It is emptied, so that nothing is started twice.
        meta.loads, meta.releases, meta.holds = [], [], []
        if meta.stopping:
            self._drain()
        if meta.alarm is not None:
            if self._bell is None and self._producer is not None:
                self._bell = Bell(meta.alarm, self._producer.has_freed)
            if self._load_bell is None and self._consumer is not None:
                self._load_bell = Bell(meta.alarm, self._has_news)
        # Before the loads, which may be of the same offers.
        for hold in holds:
            self._hold(hold)
        self.offers.start(meta)
        for load in loads:
            self._load(load)
        for offer in releases:
            self._release(offer)

    def revoke(self, meta: Meta) -> None:
        """Ends offers whose blocks are about to be used again."""
        self.offers.revoke(meta)

    def computed(self) -> None:
        """This step's forward pass is done, or on the compute stream."""
        self.offers.computed()

    def _load(self, load: Load) -> None:
        try:
            if self._consumer is None or self._asleep or self._off or load.offer is None:
                raise RuntimeError(f"there is no offer, or this rank does not pull {self._off}".rstrip())
            groups = [(g.group, g.first_position, g.blocks) for g in load.groups]
            deadline = self._awaited_deadline if load.awaited else None
            number = self._consumer.pull(load.offer, groups, self._stream(), load.awaited, deadline)
        except ENDING:
            raise
        except BaseException as e:
            self._repeats.log(logger.warning, "pull", f"kvferry: request {load.request} is prefilled here: {e}")
            self._fail(load, [b for g in load.groups for b in g.blocks if b is not None])
            blocks = sum(b is not None for g in load.groups for b in g.blocks)
            self.stats.load("failed", causes={"not_started": blocks})
            if load.offer is not None:
                # The request is prefilled here even if other ranks load. With the release, no block waits for the lease.
                self._release(load.offer)
            return
        self._pulls[number] = Running(load)
        self._by_request[load.request] = number

    def _hold(self, hold: Hold) -> None:
        try:
            if self._consumer is None or self._asleep:
                raise RuntimeError("this rank does not pull")
            held = self._consumer.hold(hold.offer, hold.awaited)
            if hold.awaited:
                self._holds[hold.offer_id] = held
        except ENDING:
            raise
        except BaseException as e:
            # A pull reports it. An awaited offer is not pulled: its prompt is prefilled here.
            self._repeats.log(logger.warning, "hold", f"kvferry: an offer is not claimed before its load: {e}")
            if hold.awaited:
                self._over.append(hold.offer_id)

    def _release(self, offer: str) -> None:
        # Each rank releases: it may hold a claim of its own.
        if self._consumer is None:
            return
        try:
            self._consumer.release(offer)
        except ENDING:
            raise
        except BaseException as e:
            self._repeats.log(
                logger.warning, "release", f"kvferry: an offer was not released and ends with its lease: {e}"
            )

    def _drain(self) -> None:
        """The engine stops: no new offers, and those that nobody has claimed end. Claimed ones end with their pulls."""
        if self._producer is None:
            return
        if not self._draining:
            self._draining = True
            logger.info("kvferry: rank %d makes no new offers: the engine stops", self._rank)
            self._producer.drain()
        self._producer.revoke_unclaimed()

    # ---- the end of a step --------------------------------------------------------------------------------------------

    def collect(self, finished: set[str]) -> Report:
        """Reports the loads and offers that have ended since the last step. `finished`: requests that have ended."""
        # Each part runs even if another one fails: without its report, a request would wait indefinitely.
        for part in (lambda: self._abort(finished), self._poll_pulls, self._poll_offers, self._check, self._gauges):
            try:
                part()
            except ENDING:
                raise
            except BaseException as e:
                # This runs in every step.
                self._repeats.log(
                    logger.exception, repr(e), f"kvferry: rank {self._rank} failed to collect its reports"
                )
        report, self._report = self._report, Report(set(), set(), set())
        return report

    def _abort(self, finished: set[str]) -> None:
        for request in finished:
            number = self._by_request.get(request)
            if number is not None and self._consumer is not None:
                self._pulls[number].aborted = True
                self._consumer.cancel(number)

    def _poll_pulls(self) -> None:
        if self._consumer is not None and self._pulls:
            for ended in self._consumer.poll():
                self._ended(ended)
        for offer_id in [o for o, hold in self._holds.items() if not hold.waits()]:
            granted = self._holds.pop(offer_id).is_granted()
            (self._begun if granted else self._over).append(offer_id)
        if self._load_bell is not None:
            self._load_bell.polled()

    def _has_news(self, limit: float) -> bool:
        """Waits until a load has ended or a claim waits no longer, for `limit` seconds at most. `False`: neither. For the
        bell's thread."""
        until = time.monotonic() + limit
        while (consumer := self._consumer) is not None:
            holds = list(self._holds.values())
            left = until - time.monotonic()
            if consumer.has_ended(min(max(left, 0), HOLD_LOOK) if holds else max(left, 0)):
                return True
            if any(not hold.waits() for hold in holds):
                return True
            if left <= 0:
                break
        return False

    def _poll_offers(self) -> None:
        self.offers.poll()
        if self._bell is not None:
            self._bell.polled()

    def _ended(self, ended: _native.Ended) -> None:
        running = self._pulls.pop(ended.pull, None)
        if running is None:
            return
        load = running.load
        self._by_request.pop(load.request, None)
        try:
            self._report_load(running, ended)
        except ENDING:
            raise
        except BaseException:
            logger.exception("kvferry: the result of request %s's load could not be read", load.request)
            self._fail(load, [b for g in load.groups for b in g.blocks if b is not None])

    def _report_load(self, running: Running, ended: _native.Ended) -> None:
        load = running.load
        if running.aborted:
            # Once this is reported, its blocks may have a new owner: no invalid blocks.
            self._report.received.add(load.request)
            self.stats.load("aborted")
            return
        if not ended.invalid:
            self._report.received.add(load.request)
            result = "loaded"
        else:
            self._fail(load, [block for _, _, block in ended.invalid])
            result = "partial" if ended.loaded and self._one_group else "failed"
            if ended.cause == "refused":
                self.stats.mismatch("handshake")
            self._failed_peers.add(ended.peer)
            self._repeats.log(
                logger.warning,
                (ended.peer, ended.cause),
                f"kvferry: request {load.request}: {ended.loaded} blocks arrived from engine {ended.peer}, "
                f"{len(ended.invalid)} did not ({ended.cause})",
            )
        self.stats.load(
            result,
            seconds=ended.ended,
            blocks=ended.loaded,
            bytes_=ended.bytes,
            lane=ended.lane,
            retries=ended.retries,
            causes=ended.causes,
        )

    def _fail(self, load: Load, invalid: list[int]) -> None:
        """Reports an incomplete load. It counts as received too; otherwise its request would wait indefinitely."""
        self._report.received.add(load.request)
        if self._one_group and invalid:
            self._invalid.update(invalid)
        else:
            self._report.failed.add(load.request)

    def invalid_blocks(self) -> set[int]:
        """The invalid blocks of the loads that `collect` has just reported."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def _check(self) -> None:
        """After a wedge, or the death of the data thread, this rank starts no new pull: it might hang too."""
        if self._off or self._consumer is None:
            return
        if not self._consumer.is_alive():
            self._fall("died")
        elif self._consumer.wedged():
            self._fall("wedged")

    def _fall(self, reason: str) -> None:
        logger.error(
            "kvferry: rank %d loads nothing any more (%s): blocks are withheld until this engine is restarted; it prefills "
            "every prompt itself",
            self._rank,
            reason,
        )
        self._turn_off(reason)
        self._changed = True

    def _gauges(self) -> None:
        """Reports the gauges if they have changed."""
        offers = claims = sessions = peers = wedged = 0
        if self._producer is not None:
            offers, claims, sessions = self._producer.live()
        if self._consumer is not None:
            peers, wedged = self._consumer.peers(), self._consumer.wedged()
        now = (peers + sessions, offers, claims, wedged, len(self._pulls))
        if now != self._last_gauges:
            self._last_gauges = now
            self.stats.gauges(self._rank, now)

    # ---- sleep and end ------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """The memory is about to be freed: stops everything that reads or writes it. GPU memory is then unmapped, so its
        registrations and mappings in other processes end too."""
        if self._asleep:
            return
        self._asleep = self.offers.asleep = True
        # Cleared at the end: whatever fails in between, this rank must not use the memory again.
        self._lost = self._gpu is not None
        if self._producer is not None:
            for offer_id in [*self.offers.held, *self.offers.open]:
                self._producer.revoke(offer_id)
        stopped = True
        if self._consumer is not None:
            for number in list(self._pulls):
                self._consumer.cancel(number)
            # vLLM has drained the transfers. Remaining pulls become quiet within milliseconds.
            stopped = quiet(self._consumer)
            if not stopped:
                logger.error("kvferry: a pull still writes KV memory that is about to be freed; restart this engine")
        if self._gpu is not None:
            self._lost = not (self._deregister() and stopped)

    def _deregister(self) -> bool:
        """Closes the producer and the consumer, which releases the memory; whether it is released."""
        self._poll_pulls()
        until = time.monotonic() + CLOSE_TO_SLEEP
        while self.offers.any() and time.monotonic() < until:
            self._poll_offers()
            time.sleep(0.001)
        if not self._close(CLOSE_TO_SLEEP):
            return False
        # Nothing reads the blocks of these offers any more.
        for offer_id in [*self.offers.held, *self.offers.open]:
            self.offers.freed(offer_id, "revoked")
        return True

    def wake(self) -> None:
        """The memory is back, at the same addresses."""
        if not self._asleep:
            return
        self._asleep = self.offers.asleep = False
        if self._gpu is None:
            return
        self._changed = True
        if self._lost:
            logger.error("kvferry is off on this engine: it did not stop before the engine went to sleep; restart it")
            self._turn_off("not_stopped_before_sleep")
            self._close(CLOSE)
            return
        try:
            self._start_or_say()
        except StartFailed:
            # The engine serves already: it goes on without kvferry, whatever the operator wants at the start.
            pass

    def news(self) -> News | None:
        """This rank's new handshake, once after a wake-up or a failure, and the requests whose loads have wedged since the last
        call."""
        wedged = self._newly_wedged()
        failed, self._failed_peers = sorted(self._failed_peers), set()
        begun, over, self._begun, self._over = self._begun, self._over, [], []
        if not (self._changed or wedged or failed or begun or over):
            return None
        handshakes = [self.handshake()] if self._changed else []
        self._changed = False
        return News(handshakes, wedged, failed, begun, over)

    def _newly_wedged(self) -> list[str]:
        if self._consumer is None or self._off not in ("wedged", "died"):
            return []
        new = [n for n in self._consumer.wedged_pulls() if n in self._pulls and n not in self._told]
        self._told.update(new)
        return [self._pulls[n].load.request for n in new]

    def shutdown(self) -> None:
        """Stops the consumer and the producer, within a second."""
        self._close(CLOSE)

    def _close(self, limit: float) -> bool:
        """Stops the consumer and the producer, each within `limit` seconds; whether both have stopped."""
        consumer, self._consumer = self._consumer, None
        producer, self._producer, self.offers.producer = self._producer, None, None
        bells, self._bell, self._load_bell = (self._bell, self._load_bell), None, None
        for bell in bells:
            if bell is not None:
                bell.stop()
        stopped = True
        for name, part in (("consumer", consumer), ("producer", producer)):
            if part is not None and not part.close(limit):
                logger.warning("kvferry: the %s is still stopping", name)
                stopped = False
        return stopped


def quiet(consumer: _native.Consumer, limit: float = 5.0) -> bool:
    """Waits until no pull writes memory; `False` after `limit` seconds."""
    until = time.monotonic() + limit
    while consumer.pulls():
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True
