"""Messages between the scheduler side and the workers. They are pickled."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass(frozen=True)
class GroupBlocks:
    """A group's blocks for consecutive positions. A position with `None` is not loaded, or not offered."""

    group: int
    first_position: int
    blocks: list[int | None]


@dataclass(frozen=True)
class Offering:
    """Blocks of a finished prefill, to be offered."""

    request: str
    offer_id: str
    # The name of the offer (JSON). It contains a secret: never log it.
    offer: str = field(repr=False)
    groups: list[GroupBlocks]


@dataclass(frozen=True)
class Opening:
    """An offer of a prefill that begins. Its blocks follow."""

    request: str
    offer_id: str
    # The name of the offer (JSON). It contains a secret: never log it.
    offer: str = field(repr=False)


@dataclass(frozen=True)
class Growth:
    """Blocks to append to an open offer."""

    offer_id: str
    groups: list[GroupBlocks]
    # Tokens that are computed with this step, from the prompt's start.
    tokens: int
    # Whether nothing follows.
    last: bool


@dataclass(frozen=True)
class Held:
    """A prefill with an open offer has finished. Its blocks are held until this offer ends, which it may have done already."""

    request: str
    offer_id: str


@dataclass(frozen=True)
class Load:
    """The load of a request that waits for remote KV. Each rank reports it exactly once."""

    request: str
    # The name of the offer (JSON). `None`: there is no offer to pull, so the workers report the load as failed.
    offer: str | None = field(repr=False)
    groups: list[GroupBlocks] = field(default_factory=list)
    # Whether the offer may not be open yet.
    awaited: bool = False


@dataclass(frozen=True)
class Hold:
    """An offer to claim before its load."""

    offer_id: str
    # The name of the offer (JSON).
    offer: str = field(repr=False)
    # Whether the offer may not be open yet. Each rank says in its news when the offer is open, or that its claim is over.
    awaited: bool


@dataclass
class Meta(KVConnectorMetadata):
    """The offers, loads and releases that the workers start in one step."""

    offerings: list[Offering] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    # Names of offers (JSON) to release without a pull.
    releases: list[str] = field(default_factory=list, repr=False)
    # Offers to claim now; their pulls start later.
    holds: list[Hold] = field(default_factory=list, repr=False)
    openings: list[Opening] = field(default_factory=list)
    # Growths of blocks that are computed already, and of those that this step computes.
    cached: list[Growth] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    # Ids of open offers that end while their requests go on: their blocks are about to be used again.
    dropped: list[str] = field(default_factory=list)
    # Ids of offers to revoke, open or not. Claims that wait for them are answered.
    revokes: list[str] = field(default_factory=list)
    # Whether the engine stops: no new offers, and unclaimed ones end.
    stopping: bool = False
    # The address to ring at when an offer or a load of this step has ended.
    alarm: str | None = None


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """A rank's address and abilities, for the scheduler side."""

    rank: int
    # `None`: the rank does not offer.
    addr: str | None
    incarnation: str | None
    # Whether the rank can pull.
    pulls: bool
    # Fingerprint of its model's weights.
    weights: str = ""
    # Why the rank does not work; empty: it does.
    off: str = ""


@dataclass
class News(KVConnectorWorkerMetadata):
    """The new state of ranks, for the scheduler side."""

    # Handshakes of ranks that have restarted, or no longer work.
    handshakes: list[Handshake]
    # Requests whose loads will never be reported, since their lane is wedged.
    wedged: list[str] = field(default_factory=list)
    # Engines from which a load has failed.
    failed: list[str] = field(default_factory=list)
    # Ids of awaited offers that are open, once for each rank, and of those whose claims have ended without that.
    begun: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "News":
        """Both ranks' news."""
        assert isinstance(other, News)
        return News(
            self.handshakes + other.handshakes,
            self.wedged + other.wedged,
            self.failed + other.failed,
            self.begun + other.begun,
            self.over + other.over,
        )
