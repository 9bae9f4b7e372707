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


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """A rank's address and abilities, for the scheduler side."""

    rank: int
    # `None`: the rank does not offer.
    addr: str | None
    incarnation: str | None
    # Whether the rank can pull.
    pulls: bool


@dataclass
class Restarted(KVConnectorWorkerMetadata):
    """The new handshakes of ranks that have restarted, for the scheduler side."""

    handshakes: list[Handshake]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Restarted":
        """Both ranks' handshakes."""
        assert isinstance(other, Restarted)
        return Restarted(self.handshakes + other.handshakes)
