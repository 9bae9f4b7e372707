"""kvferry's metrics in vLLM's style: collected on each rank and in the scheduler, sent with the step's output.

vLLM sets its own prompt-token counters once, when a request is looked up, and never corrects them after a failed load.
kvferry's metrics are counted at the end of a load, so they stay true after failures.
"""

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvferry.vllm import health

# From 100 us (one small block inside a host) to 30 s (a long prompt over a slow link).
SECONDS = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]

# Counters: `key -> (name, help, label)`. A counter with a label holds `{label value: count}`.
COUNTERS: dict[str, tuple[str, str, str | None]] = {
    "loads": ("loads", "Loads from prefill engines, by result; each rank counts its own.", "result"),
    "blocks_loaded": ("blocks_loaded", "Blocks that arrived.", None),
    "blocks_invalid": ("blocks_invalid", "Blocks that did not arrive, by cause.", "cause"),
    "bytes": ("bytes_loaded", "Bytes of loaded blocks, by lane.", "lane"),
    "retries": ("retries", "Attempts after the first one of a load.", None),
    "tokens_loaded": ("tokens_loaded", "Prompt tokens taken from loads, complete or not.", None),
    "tokens_salvaged": ("tokens_salvaged", "Prompt tokens taken from incomplete loads.", None),
    "tokens_recomputed": ("tokens_recomputed", "Prompt tokens that loads did not deliver.", None),
    "offers": ("offers_ended", "Offers whose blocks are free again, by reason.", "why"),
    "refused": ("params_refused", "Requests whose kv_transfer_params were refused.", None),
    "mismatches": ("mismatches", "Offers that did not fit the request or this engine, by the part that differs.", "part"),
}

# Gauges, summed over the ranks that report them.
GAUGES: tuple[tuple[str, str], ...] = (
    ("peers_up", "Peers with an open session."),
    ("leases_offered", "Offers whose blocks are held for a decode engine."),
    ("leases_claimed", "Claims of decode engines on those offers."),
    ("loads_wedged", "Loads whose blocks are withheld until a restart."),
    ("loads_running", "Loads that are running."),
)


def empty() -> dict[str, Any]:
    """A container without observations: plain numbers, lists and dicts, so that it can be sent."""
    data: dict[str, Any] = {key: {} if label else 0 for key, (_, _, label) in COUNTERS.items()}
    return data | {"seconds": [], "gauges": {}, "up": {}}


@dataclass
class KvFerryStats(KVConnectorStats):
    """The metrics since the last step."""

    def __post_init__(self) -> None:
        self.data = empty() | self.data

    def reset(self) -> None:
        self.data = empty()

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def take(self) -> "KvFerryStats | None":
        """Returns the metrics and resets them; `None` if there are none."""
        if self.is_empty():
            return None
        taken = KvFerryStats(self.data)
        self.reset()
        return taken

    def aggregate(self, other: KVConnectorStats) -> "KvFerryStats":
        mine, more = self.data, empty() | other.data
        for key, (_, _, label) in COUNTERS.items():
            if label:
                for value, n in more[key].items():
                    mine[key][value] = mine[key].get(value, 0) + n
            else:
                mine[key] += more[key]
        mine["seconds"] = [*mine["seconds"], *more["seconds"]]
        # By rank: a later value replaces an earlier one.
        for key in ("gauges", "up"):
            mine[key] = {**mine[key], **more[key]}
        return self

    def reduce(self) -> dict[str, int | float]:
        d = self.data
        seconds = sorted(d["seconds"])
        return {
            "Loads": sum(d["loads"].values()),
            "Loads not complete": sum(n for result, n in d["loads"].items() if result in ("partial", "failed")),
            "MB": round(sum(d["bytes"].values()) / 2**20, 3),
            "Median ms": round(seconds[len(seconds) // 2] * 1e3, 3) if seconds else 0,
            "Blocks loaded": d["blocks_loaded"],
            "Blocks invalid": sum(d["blocks_invalid"].values()),
            "Tokens salvaged": d["tokens_salvaged"],
            "Tokens recomputed": d["tokens_recomputed"],
        }

    # ---- counting -----------------------------------------------------------------------------------------------------

    def _add(self, key: str, value: str, n: int = 1) -> None:
        self.data[key][value] = self.data[key].get(value, 0) + n

    def load(
        self,
        result: str,
        *,
        seconds: float | None = None,
        blocks: int = 0,
        bytes_: int = 0,
        lane: str | None = None,
        retries: int = 0,
        causes: dict[str, int] | None = None,
    ) -> None:
        """Counts the end of one rank's load: `loaded`, `partial`, `failed` or `aborted`."""
        self._add("loads", result)
        if seconds is not None:
            self.data["seconds"].append(seconds)
        self.data["blocks_loaded"] += blocks
        if bytes_ and lane:
            self._add("bytes", lane, bytes_)
        self.data["retries"] += retries
        for cause, n in (causes or {}).items():
            self._add("blocks_invalid", cause, n)

    def tokens(self, loaded: int, missing: int) -> None:
        """Counts the tokens of a load that has ended on all ranks."""
        self.data["tokens_loaded"] += loaded
        if missing:
            self.data["tokens_salvaged"] += loaded
            self.data["tokens_recomputed"] += missing

    def offer_ended(self, why: str) -> None:
        """Counts an offer of one rank whose blocks are free again."""
        self._add("offers", why)

    def refused(self) -> None:
        """Counts a request whose params were refused."""
        self.data["refused"] += 1

    def mismatch(self, part: str) -> None:
        """Counts an offer that does not fit: its prompt, its weights, …"""
        self._add("mismatches", part)

    def up(self, part: str, off: str) -> None:
        """Sets whether a part works, the scheduler side or a rank. `off`: why not; empty: it works."""
        self.data["up"][part] = off

    def gauges(self, rank: int, values: tuple[int, ...]) -> None:
        """Sets a rank's gauges, in the order of `GAUGES`."""
        self.data["gauges"][str(rank)] = list(values)


class KvFerryPromMetrics(KVConnectorPromMetrics):
    """The metrics for Prometheus."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)  # type: ignore[arg-type]
        self._counters = {
            key: self._counter_cls(
                name=f"vllm:kvferry_{name}",
                documentation=text,
                labelnames=[*labelnames, label] if label else labelnames,
            )
            for key, (name, text, label) in COUNTERS.items()
        }
        # The last gauges of each engine's ranks. A rank reports its gauges when they change.
        self._known: dict[int, dict[str, list[int]]] = {}
        # Why the parts of each engine do not work, and the reason that its gauge shows.
        self._off: dict[int, dict[str, str]] = {}
        self._shown: dict[int, str] = {}
        self._up = self._gauge_cls(
            name="vllm:kvferry_up",
            documentation="1 while KV is transferred; 0, with the reason, while every prompt is prefilled where it is decoded.",
            labelnames=[*labelnames, "reason"],
            multiprocess_mode="mostrecent",
        )
        self._gauges = [
            self._gauge_cls(name=f"vllm:kvferry_{name}", documentation=text, labelnames=labelnames, multiprocess_mode="mostrecent")
            for name, text in GAUGES
        ]
        self._seconds = self._histogram_cls(
            name="vllm:kvferry_transfer_seconds",
            documentation="From the start of a load to its end, one observation for each rank.",
            buckets=SECONDS,
            labelnames=labelnames,
        )
        # The names exist before the first event.
        for values in per_engine_labelvalues.values():
            self._seconds.labels(*values)
            for gauge in self._gauges:
                gauge.labels(*values)
            for key, (_, _, label) in COUNTERS.items():
                if not label:
                    self._counters[key].labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        data = empty() | transfer_stats_data
        values = self.per_engine_labelvalues[engine_idx]
        for key, (_, _, label) in COUNTERS.items():
            counter = self._counters[key]
            if label:
                for value, n in data[key].items():
                    counter.labels(*values, value).inc(n)
            elif data[key]:
                counter.labels(*values).inc(data[key])
        for s in data["seconds"]:
            self._seconds.labels(*values).observe(s)
        if data["up"]:
            self._observe_up(engine_idx, data["up"])
        if data["gauges"]:
            known = self._known.setdefault(engine_idx, {})
            known.update(data["gauges"])
            for i, gauge in enumerate(self._gauges):
                gauge.labels(*values).set(sum(rank[i] for rank in known.values()))

    def _observe_up(self, engine_idx: int, parts: dict[str, str]) -> None:
        known = self._off.setdefault(engine_idx, {})
        known.update(parts)
        reason = next((off for off in known.values() if off), "")
        values, shown = self.per_engine_labelvalues[engine_idx], self._shown.get(engine_idx)
        if shown is not None and shown != reason:
            self._up.remove(*values, shown)
        self._up.labels(*values, reason).set(0 if reason else 1)
        self._shown[engine_idx] = reason
        health.set_bad(engine_idx, reason if reason in health.BAD else "")
