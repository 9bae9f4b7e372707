"""The connector that vLLM loads. It translates vLLM's calls and raises no exception, unless it cannot start.

Loads are asynchronous. A method that fails returns a neutral value (no tokens matched, no blocks kept, nothing ended), so
that the engine prefills the prompt itself.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvferry.vllm import pool
from kvferry.vllm.guard import ENDING, StartFailed, logger, never_raises
from kvferry.vllm.messages import Meta
from kvferry.vllm.scheduler import SchedulerSide
from kvferry.vllm.stats import KvFerryPromMetrics, KvFerryStats
from kvferry.vllm.worker import Report, WorkerSide, start_failed

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # Missing in vLLM 0.31.
    CacheHitSource = None  # type: ignore[assignment, misc]


class KvFerryConnector(KVConnectorBase_V1, SupportsHMA):
    """The KV connector, for vLLM 0.31 to 0.33."""

    if CacheHitSource is not None:
        _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._side: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._orphans: set[str] = set()
        self._unsent: set[str] = set()
        # The metrics of a side that could not start.
        self._failed = KvFerryStats()
        self._begin(vllm_config, role, kv_cache_config)

    def _begin(self, config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        try:
            if role == KVConnectorRole.SCHEDULER:
                self._side = SchedulerSide(config, kv_cache_config)
            else:
                self._worker = WorkerSide(config, kv_cache_config)
        except (StartFailed, *ENDING):
            raise
        except BaseException as e:
            start_failed(config, e)
            self._failed.up(role.name.lower(), "start_failed")

    # ---- class methods ------------------------------------------------------------------------------------------------

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str | None:
        """A layout that keeps each head's bytes together, so that ranks of another tensor-parallel size can read their heads.
        MLA has no KV heads: any layout will do."""
        model = vllm_config.model_config
        return None if model is None or getattr(model, "use_mla", False) else pool.BY_HEAD

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> "KVConnectorStats | None":
        """Rebuilds the metrics that a rank or the scheduler sent."""
        return KvFerryStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> "KVConnectorPromMetrics | None":
        """The metrics for Prometheus."""
        return KvFerryPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: "KVTransferConfig") -> bool:
        """Yes: see `unregister_kv_caches`."""
        return True

    # ---- scheduler ----------------------------------------------------------------------------------------------------

    def get_loaded_kv_cache_group_ids(self, request: "Request") -> tuple[int, ...]:
        """The groups whose blocks a load fills: all groups that kvferry transfers."""
        return pool.transfer_groups(self._kv_cache_config)

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Receives the handshake metadata of each tensor-parallel rank."""
        self.set_xfer_handshake_metadata_pp_aware({(0, tp): m for tp, m in metadata.items()})

    @never_raises(lambda: None)
    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Receives the handshake metadata of each rank."""
        if self._side is not None:
            self._side.ranks(metadata)

    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        """Receives the scheduler's cache manager. See `Transfers` and `SchedulerSide.kept_tokens`."""
        super().bind_kv_cache_manager(kv_cache_manager)
        side = self._side
        if side is not None:
            side.transfers.bind(kv_cache_manager)
        if side is None or not side.windows:
            return
        # The manager frees blocks through it in each step and at the end of a request.
        coordinator = kv_cache_manager.coordinator
        remove = coordinator.remove_skipped_blocks

        def removing(request_id: str, processed_computed_tokens: int, *args: Any, **kwargs: Any) -> None:
            remove(request_id, side.kept_tokens(request_id, processed_computed_tokens), *args, **kwargs)

        coordinator.remove_skipped_blocks = removing  # type: ignore[method-assign]

    @never_raises(lambda: None)
    def on_new_request(self, request: "Request") -> None:
        """The scheduler has heard of a request."""
        if self._side is not None:
            self._side.arrived(request)

    @never_raises(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """The number of prompt tokens that can be loaded, and whether the load is asynchronous."""
        return self._side.matched(request, num_computed_tokens) if self._side is not None else (0, False)

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        """The request's blocks are allocated. If it has tokens to load, it now waits until the workers report its load."""
        if self._side is None:
            return
        try:
            self._side.allocated(request, blocks, num_external_tokens)
        except ENDING:
            raise
        except BaseException:
            logger.exception("kvferry: request %s is prefilled here: its load could not be prepared", request.request_id)
            if num_external_tokens > 0:
                self._side.give_up(request)

    @never_raises(Meta)
    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        """The offers, loads and releases that the workers start in this step."""
        return self._side.meta(scheduler_output) if self._side is not None else Meta()

    @never_raises(lambda: None)
    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Receives the workers' reports of this step."""
        if self._side is not None:
            self._side.output(connector_output)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended; the engine has one cache group."""
        return self.request_finished_all_groups(request, (block_ids,))

    @never_raises(lambda: (False, None))
    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended. Returns whether its blocks are kept for a decode engine, and the params for that engine."""
        return self._side.finished(request, block_ids) if self._side is not None else (False, None)

    @never_raises(lambda: False)
    def has_pending_push_work(self) -> bool:
        """Whether the workers need a step even without requests."""
        return self._side is not None and self._side.pending()

    # ---- worker -------------------------------------------------------------------------------------------------------

    @never_raises(lambda: None)
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Receives the engine's KV memory."""
        if self._worker is not None:
            self._worker.register(kv_caches)

    @never_raises(lambda: None)
    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """This rank's handshake for the scheduler side."""
        return self._worker.handshake() if self._worker is not None else None

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """The step begins. Offers and pulls start here rather than after the forward pass, which may take long. The forward
        pass touches no block that is being offered or loaded.

        On a GPU the compute stream now holds the earlier steps, their draft passes and this step's zeroing, but not this
        forward pass. Offers and pulls wait for what it holds."""
        super().bind_connector_metadata(connector_metadata)
        self._start(connector_metadata)

    @never_raises(lambda: None)
    def _start(self, meta: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(meta, Meta):
            self._worker.start(meta)
        elif isinstance(meta, Meta):
            # This rank's worker side failed to start. Its loads and offers must still be reported.
            self._orphans.update(load.request for load in meta.loads)
            self._unsent.update(sent.request for sent in (*meta.offerings, *meta.held))

    @never_raises(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """The step is about to use blocks again. Their offers end first."""
        if self._worker is not None and isinstance(kv_connector_metadata, Meta):
            self._worker.revoke(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Does nothing: loads started when the step began."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing: loads are asynchronous."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Does nothing: decode engines read the blocks in place."""

    @never_raises(lambda: None)
    def wait_for_save(self) -> None:
        """The forward pass is done, or on the compute stream: its blocks can be offered."""
        if self._worker is not None:
            self._worker.computed()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The offers and loads that have ended since the last step."""
        report = self._collect(finished_req_ids)
        return KVConnectorTransferResults(
            finished_sending=report.sent, finished_recving=report.received, failed_recving=report.failed
        )

    @never_raises(lambda: Report(set(), set(), set()))
    def _collect(self, finished: set[str]) -> Report:
        if self._worker is not None:
            return self._worker.collect(finished)
        lost, unsent = self._orphans, self._unsent
        self._orphans, self._unsent = set(), set()
        return Report(unsent, lost, set(lost))

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The same for older versions of vLLM."""
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending or None, results.finished_recving or None

    @never_raises(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that did not arrive, of the loads just reported."""
        return self._worker.invalid_blocks() if self._worker is not None else set()

    @never_raises(lambda: None)
    def get_kv_connector_stats(self) -> "KVConnectorStats | None":
        """The metrics since the last step, of the worker or the scheduler side."""
        side = self._worker or self._side
        return (side.stats if side is not None else self._failed).take()

    @never_raises(lambda: None)
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """This rank's new state, once after a change."""
        return self._worker.news() if self._worker is not None else None

    # ---- sleep and end ------------------------------------------------------------------------------------------------

    @never_raises(lambda: None)
    def unregister_kv_caches(self) -> None:
        """Before sleep: stops all access to the KV memory, and ends the registration of GPU memory."""
        if self._worker is not None:
            self._worker.sleep()

    @never_raises(lambda: None)
    def restore_kv_caches(self) -> None:
        """After the wake-up: registers GPU memory again, and allows offers and loads."""
        if self._worker is not None:
            self._worker.wake()

    @never_raises(lambda: None)
    def shutdown(self) -> None:
        """Stops the producer and the consumer, within a second."""
        if self._worker is not None:
            self._worker.shutdown()
        if self._side is not None:
            self._side.close()


