"""kvferry's producer and consumer. A bad argument is a `ValueError`; a failure of this process is a `RuntimeError`."""

def engine_incarnation(ranks: list[str]) -> str: ...
def name_offer(
    *,
    engine: str,
    incarnation: str,
    ranks: list[tuple[int, str, str]],
    tokens: int,
    request: str,
    fingerprints: dict[str, str],
    seal_keys: list[bytes],
    number: int = 0,
    transfer: str | None = None,
) -> tuple[str, str]: ...
def transfer_offer(transfer: str) -> str: ...
def check_offer(offer: str, seal_keys: list[bytes]) -> None: ...

class Identity:
    def __init__(
        self,
        *,
        engine: str,
        rank: int,
        tp: tuple[int, int],
        pp: tuple[int, int],
        heads: tuple[int, int],
        layers: tuple[int, int],
        model: str,
        dtype: str,
        scales: str,
        weights: str,
        attention: str,
        block_tokens: int,
    ) -> None: ...

class Pool:
    def __init__(
        self,
        segments: list[tuple[int, int]],
        groups: list[tuple[int, str, int, int, list[tuple[str, int, int, int, int]]]],
        keep: object,
        gpu: bool = False,
    ) -> None: ...
    @property
    def place(self) -> str: ...

class Settings:
    def __init__(
        self,
        *,
        lanes: list[str] | None = None,
        deadline: float | None = None,
        unclaimed_lease: float | None = None,
        claim_lease: float | None = None,
        hard_cap: float | None = None,
        early_grace: float | None = None,
        chunk_min: int | None = None,
        chunk_max: int | None = None,
        tcp_connections: int | None = None,
        on_wedge: str | None = None,
        fault: str | None = None,
        tls: tuple[str, str, str, str] | None = None,
        seal_keys: list[bytes] = [],
        patience: float | None = None,
        dial: list[str] = [],
        engines: list[str] = [],
        tcp_checksum: bool = False,
        gpu_copy: str | None = None,
        gpu_ring: int | None = None,
        queued: float | None = None,
        stalled: float | None = None,
    ) -> None: ...
    def lanes(self) -> list[tuple[str, str | None]]: ...

class Producer:
    incarnation: str
    addr: str
    def __init__(
        self, identity: Identity, pool: Pool, settings: Settings, listen: str, advertise: str | None = None
    ) -> None: ...
    def enter(
        self, json: str, blocks: list[tuple[int, int, list[int | None]]], stream: int | None = None
    ) -> None: ...
    def enter_open(self, json: str) -> None: ...
    def grow(
        self,
        id: str,
        blocks: list[tuple[int, int, list[int | None]]],
        tokens: int,
        last: bool = False,
        stream: int | None = None,
    ) -> bool: ...
    def revoke(self, id: str) -> None: ...
    def drain(self) -> None: ...
    def revoke_unclaimed(self) -> None: ...
    def poll_freed(self) -> list[tuple[str, str]]: ...
    def has_freed(self, limit: float) -> bool: ...
    def live(self) -> tuple[int, int, int]: ...
    def close(self, limit: float) -> bool: ...

class Consumer:
    def __init__(self, identity: Identity, pool: Pool, settings: Settings) -> None: ...
    def pull(
        self,
        json: str,
        blocks: list[tuple[int, int, list[int | None]]],
        stream: int | None = None,
        awaited: bool = False,
        deadline: float | None = None,
    ) -> int: ...
    def cancel(self, pull: int) -> None: ...
    def hold(self, json: str, awaited: bool = False) -> Hold: ...
    def release(self, json: str) -> None: ...
    def poll(self) -> list[Ended]: ...
    def has_ended(self, limit: float) -> bool: ...
    def pulls(self) -> int: ...
    def wedged(self) -> int: ...
    def wedged_pulls(self) -> list[int]: ...
    def is_alive(self) -> bool: ...
    def peers(self) -> int: ...
    def progress(self, pull: int) -> tuple[int, int] | None: ...
    def loaded_prefix(self, pull: int) -> int | None: ...
    def close(self, limit: float) -> bool: ...

class Hold:
    def waits(self) -> bool: ...
    def is_granted(self) -> bool: ...

class Ended:
    pull: int
    peer: str
    invalid: list[tuple[int, int, int]]
    loaded: int
    bytes: int
    causes: dict[str, int]
    cause: str | None
    lane: str | None
    retries: int
    claimed: float | None
    ended: float | None
