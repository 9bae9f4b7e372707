"""The options in `kv_connector_extra_config` and in the environment."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry import _native
from kvferry.vllm.guard import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Longer than the library's default: a prefill worker receives an offer with its next step, and a step may be long.
EARLY_GRACE = 15.0
# The library's default for the longest life of an offer.
HARD_CAP = 600.0
# Covers the time from the prefill's answer to the claim, including the queues of the router and of the decode engine.
UNCLAIMED_LEASE = 60.0


@dataclass(frozen=True)
class Options:
    """The options of one rank. Times are in seconds."""

    # Address that this engine's ranks listen on, and the first rank's port; 0: each rank takes a free port.
    host: str = "127.0.0.1"
    port: int = 0
    # Host in offers, if it differs from `host`.
    advertise: str | None = None
    # Allowed lanes, best first.
    lanes: tuple[str, ...] | None = None
    # Longest time from the start of a pull to its decision.
    deadline: float = 30.0
    unclaimed_lease: float = UNCLAIMED_LEASE
    claim_lease: float | None = None
    hard_cap: float | None = None
    early_grace: float = EARLY_GRACE
    chunk_min: int | None = None
    chunk_max: int | None = None
    tcp_connections: int | None = None
    on_wedge: str | None = None
    # After an error at the start: `exit` stops the engine; `off` lets it prefill every prompt itself.
    on_start_failure: str = "exit"
    # Faults to inject: `throttle=20M,down@64M`.
    fault: str | None = None
    # The model's name, equal on both sides; by default vLLM's `--model`.
    model_id: str | None = None
    # PEM files: all three or none. Read again when they change.
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    tls_server_name: str = "kvferry"
    # Files with seal keys, equal on all engines: the first one seals the names of offers, and all are accepted. Without keys
    # any name is accepted.
    seal_keys: tuple[str, ...] = ()
    # How long a load may move nothing from a silent peer before it gives up.
    patience: float | None = None
    # The longest waits of a load whose prefill still runs: for its first block, and for each further one.
    queued: float | None = None
    stalled: float | None = None
    # Port of the bootstrap endpoint, on `host`. `None`: there is none, and nothing is offered before it is computed.
    bootstrap_port: int | None = None
    # Hosts that this engine connects to: networks, addresses, host names, or `.suffix` of host names. Empty: every host.
    dial: tuple[str, ...] = ()
    # Engine ids that this engine exchanges KV with. Empty: every engine.
    engines: tuple[str, ...] = ()
    # Checksum the data of TCP lanes, if the other side does too.
    tcp_checksum: bool = False
    # For a cache in GPU memory: how ranges are copied, and the bytes of the pinned ring in host memory.
    gpu_copy: str | None = None
    gpu_ring: int | None = None

    @classmethod
    def of(cls, config: "VllmConfig") -> "Options":
        """Reads the options of a vLLM configuration. Unknown keys are logged and ignored."""
        transfer = config.kv_transfer_config
        given: dict[str, Any] = dict(getattr(transfer, "kv_connector_extra_config", None) or {})
        known = cls.__dataclass_fields__
        values: dict[str, Any] = {}
        # Deployments of the NIXL connector set the second variable.
        host = os.environ.get("KVFERRY_HOST") or os.environ.get("VLLM_NIXL_SIDE_CHANNEL_HOST")
        if host:
            values["host"] = host
        if port := os.environ.get("KVFERRY_PORT"):
            values["port"] = port
        # Deployments of Mooncake's connector set this one.
        if port := os.environ.get("KVFERRY_BOOTSTRAP_PORT") or os.environ.get("VLLM_MOONCAKE_BOOTSTRAP_PORT"):
            values["bootstrap_port"] = port
        for name, value in given.items():
            if name in known:
                values[name] = value
            else:
                logger.warning("kvferry: kv_connector_extra_config has an unknown key %r; it is ignored", name)
        if "lanes" in values and values["lanes"] is not None:
            lanes = values["lanes"]
            values["lanes"] = tuple(lanes.split(",") if isinstance(lanes, str) else lanes)
        for name in ("seal_keys", "dial", "engines"):
            if values.get(name):
                listed = values[name]
                values[name] = tuple(listed.split(",") if isinstance(listed, str) else listed)
        for name in ("port", "chunk_min", "chunk_max", "tcp_connections", "gpu_ring", "bootstrap_port"):
            if values.get(name) is not None:
                values[name] = int(values[name])
        seconds = ("deadline", "unclaimed_lease", "claim_lease", "hard_cap", "early_grace", "patience", "queued", "stalled")
        for name in seconds:
            if values.get(name) is not None:
                values[name] = float(values[name])
        if values.get("on_start_failure", "exit") not in ("exit", "off"):
            raise ValueError(f"unknown on_start_failure {values['on_start_failure']!r}: use exit or off")
        return cls(**values)

    def keys(self) -> list[bytes]:
        """The contents of the seal key files."""
        return [Path(p).read_bytes() for p in self.seal_keys]

    def native(self) -> _native.Settings:
        """The settings for the native part, which checks them."""
        tls = None
        if self.tls_cert and self.tls_key and self.tls_ca:
            tls = (self.tls_cert, self.tls_key, self.tls_ca, self.tls_server_name)
        elif self.tls_cert or self.tls_key or self.tls_ca:
            raise ValueError("tls_cert, tls_key and tls_ca belong together: set all three or none")
        return _native.Settings(
            lanes=list(self.lanes) if self.lanes else None,
            deadline=self.deadline,
            unclaimed_lease=self.unclaimed_lease,
            claim_lease=self.claim_lease,
            hard_cap=self.hard_cap,
            early_grace=self.early_grace,
            chunk_min=self.chunk_min,
            chunk_max=self.chunk_max,
            tcp_connections=self.tcp_connections,
            on_wedge=self.on_wedge,
            fault=self.fault,
            tls=tls,
            seal_keys=self.keys(),
            patience=self.patience,
            dial=list(self.dial),
            engines=list(self.engines),
            tcp_checksum=bool(self.tcp_checksum),
            gpu_copy=self.gpu_copy,
            gpu_ring=self.gpu_ring,
            queued=self.queued,
            stalled=self.stalled,
        )

    def awaited_deadline(self) -> float:
        """From the start of a load whose prefill still runs to its decision: as long as an offer lives."""
        return max(self.deadline, self.hard_cap or HARD_CAP)

    def listen(self, rank: int, ranks: int, replica: int) -> str:
        """`HOST:PORT` that a rank listens on. Each data-parallel replica uses one port per rank."""
        port = self.port + replica * ranks + rank if self.port else 0
        return join(self.host, port)

    def reached_at(self) -> str | None:
        """`HOST:PORT` in offers, if it differs from the listening address. Port 0 stands for the port that a rank listens on."""
        return join(self.advertise, 0) if self.advertise else None


def join(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
