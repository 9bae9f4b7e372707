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
class Load:
    """The load of a request that waits for remote KV. Each rank reports it exactly once."""

    request: str
    # The name of the offer (JSON). `None`: there is no offer to pull, so the workers report the load as failed.
    offer: str | None = field(repr=False)
    groups: list[GroupBlocks] = field(default_factory=list)


@dataclass
class Meta(KVConnectorMetadata):
    """The offers, loads and releases that the workers start in one step."""

    offerings: list[Offering] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    # Names of offers (JSON) to release without a pull.
    releases: list[str] = field(default_factory=list, repr=False)
    # Names of offers (JSON) to claim now; their pulls start later.
    holds: list[str] = field(default_factory=list, repr=False)
    # Whether the engine stops: no new offers, and those that nobody has claimed end.
    stopping: bool = False
    # Where to ring when an offer of this step is freed.
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

    # Of ranks that have restarted, or do not work any more.
    handshakes: list[Handshake]
    # Requests whose loads will never be reported, since their lane is wedged.
    wedged: list[str] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "News":
        """Both ranks' news."""
        assert isinstance(other, News)
        return News(self.handshakes + other.handshakes, self.wedged + other.wedged)
