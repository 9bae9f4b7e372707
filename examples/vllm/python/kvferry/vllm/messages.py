"""What the scheduler side and the workers tell each other. All of it is pickled."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata


@dataclass(frozen=True)
class Offering:
    """Blocks of a finished prefill that are offered from now on."""

    request: str
    offer_id: str
    # The offer, JSON.
    offer: str


@dataclass(frozen=True)
class GroupBlocks:
    """A group's blocks for consecutive positions; `None` where nothing is wanted."""

    group: int
    first_position: int
    blocks: list[int | None]


@dataclass(frozen=True)
class Load:
    """A request that waits for remote KV. Each rank reports it exactly once."""

    request: str
    # The offer, JSON; `None`: there is none to pull, report it as failed.
    offer: str | None
    groups: list[GroupBlocks] = field(default_factory=list)


@dataclass
class Meta(KVConnectorMetadata):
    """What a step's workers have to start."""

    offerings: list[Offering] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    # Offers, JSON, to let go of without a pull.
    releases: list[str] = field(default_factory=list)


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """What the scheduler side must know of a rank."""

    rank: int
    # `None`: it does not offer.
    addr: str | None
    incarnation: str | None
    # Whether it can pull.
    pulls: bool
