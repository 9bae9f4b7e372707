"""A rank's offers: finished prefills, and running ones whose offers grow with each step.

Each held offer is reported once, when its blocks may be used again. An offer may end while its prefill runs: the blocks then
belong to the prefill until it has finished.
"""

import sys
from collections.abc import Callable

from kvferry import _native
from kvferry.vllm.guard import ENDING, logger
from kvferry.vllm.messages import Growth, Held, Meta, Offering, Opening
from kvferry.vllm.repeats import Repeats
from kvferry.vllm.stats import KvFerryStats


class Offers:
    """The offers of one rank. `sent` is told each request whose blocks may be used again. `stream`: the compute stream of the
    calling thread, if the cache is in GPU memory. `drafts`: a draft model may write its part of the blocks after the hook that
    ends the forward pass."""

    def __init__(
        self,
        stats: KvFerryStats,
        repeats: Repeats,
        sent: Callable[[str], None],
        stream: Callable[[], int | None],
        drafts: bool,
    ) -> None:
        self._stats, self._repeats, self._sent, self._stream, self._drafts = stats, repeats, sent, stream, drafts
        # `None`: this rank offers nothing.
        self.producer: _native.Producer | None = None
        # Whether the engine sleeps: its memory must not be used.
        self.asleep = False
        # By offer, the request whose blocks are held for it.
        self.held: dict[str, str] = {}
        # Open offers of running prefills: whether each is still live.
        self.open: dict[str, bool] = {}
        # Growths whose blocks the running step computes.
        self._growing: list[Growth] = []

    def any(self) -> bool:
        """Whether an offer may end."""
        return bool(self.held) or any(self.open.values())

    def start(self, meta: Meta) -> None:
        """Starts the offers of a step, once."""
        offerings, openings, cached, held = meta.offerings, meta.openings, meta.cached, meta.held
        self.revoke(meta)
        # The growths of an earlier step, which is done.
        self._grow_all()
        self._growing = meta.growths
        meta.offerings, meta.openings, meta.cached, meta.growths, meta.held = [], [], [], [], []
        for offering in offerings:
            self.offer(offering)
        for opening in openings:
            self._open(opening)
        for growth in cached:
            self._grow(growth)
        for end in held:
            self._keep(end)

    def revoke(self, meta: Meta) -> None:
        """Ends the offers that the scheduler side ends, once, before their blocks are used again."""
        dropped, revokes = meta.dropped, meta.revokes
        meta.dropped, meta.revokes = [], []
        for offer_id in dropped:
            self.open.pop(offer_id, None)
        if self.producer is not None:
            for offer_id in (*dropped, *revokes):
                self.producer.revoke(offer_id)

    def computed(self) -> None:
        """This step's forward pass is done, or on the compute stream."""
        # vLLM calls this hook while an exception propagates, too: then nothing was computed.
        if not self._drafts and sys.exc_info()[0] is None:
            self._grow_all()

    def _grow_all(self) -> None:
        growths, self._growing = self._growing, []
        for growth in growths:
            self._grow(growth)

    def _open(self, opening: Opening) -> None:
        if opening.offer_id in self.open or opening.offer_id in self.held:
            # Another request has offered it under the same name.
            line = f"kvferry: request {opening.request} is not offered: another request has the same transfer id"
            return self._repeats.log(logger.warning, "enter", line)
        try:
            if self.producer is None or self.asleep:
                raise RuntimeError("this rank has no producer")
            self.producer.enter_open(opening.offer)
            self.open[opening.offer_id] = True
        except ENDING:
            raise
        except BaseException as e:
            self._repeats.log(logger.warning, "enter", f"kvferry: request {opening.request} is not offered: {e}")
            self._give_up(opening.offer_id)

    def _grow(self, growth: Growth) -> None:
        if not self.open.get(growth.offer_id) or self.producer is None:
            return
        try:
            groups = [(g.group, g.first_position, g.blocks) for g in growth.groups]
            self.producer.grow(growth.offer_id, groups, growth.tokens, growth.last, self._stream())
        except ENDING:
            raise
        except BaseException as e:
            self._repeats.log(logger.warning, "grow", f"kvferry: offer {growth.offer_id} is revoked: {e}")
            self._give_up(growth.offer_id)

    def _give_up(self, offer_id: str) -> None:
        """Revokes an offer that a decode engine may wait for."""
        if self.producer is not None:
            self.producer.revoke(offer_id)

    def _keep(self, held: Held) -> None:
        """A prefill with an open offer has finished. If the offer has ended, its blocks are free."""
        if self.open.pop(held.offer_id, False):
            self.held[held.offer_id] = held.request
        else:
            self._sent(held.request)

    def offer(self, offering: Offering) -> None:
        """Offers a finished prefill."""
        try:
            if self.producer is None or self.asleep:
                raise RuntimeError("this rank has no producer")
            self.held[offering.offer_id] = offering.request
            groups = [(g.group, g.first_position, g.blocks) for g in offering.groups]
            self.producer.enter(offering.offer, groups, self._stream())
        except ENDING:
            raise
        except BaseException as e:
            self._repeats.log(logger.warning, "enter", f"kvferry: request {offering.request} is not offered: {e}")
            self.held.pop(offering.offer_id, None)
            self._sent(offering.request)
            if self.producer is not None:
                # Its params are on the way to the decode side, which would wait for the offer.
                self.producer.revoke(offering.offer_id)

    def poll(self) -> None:
        """Takes the news of offers that have ended."""
        for offer_id, why in self.producer.poll_freed() if self.producer is not None else ():
            self.freed(offer_id, why)

    def freed(self, offer_id: str, why: str) -> None:
        """An offer has ended: nothing reads its blocks any more."""
        request = self.held.pop(offer_id, None)
        if request is not None:
            self._sent(request)
        elif self.open.get(offer_id):
            # Its prefill still runs, and needs the blocks.
            self.open[offer_id] = False
        else:
            return
        self._stats.offer_ended(why)
        if why != "released":
            what = f"request {request}: its offer" if request else f"offer {offer_id} of a running prefill"
            line = f"kvferry: {what} ended before a decode engine had all of it ({why})"
            self._repeats.log(logger.warning, ("offer", why), line)
