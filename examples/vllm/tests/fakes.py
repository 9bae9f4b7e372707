"""Stand-ins for parts of vLLM and PyTorch that need a GPU or a running engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

BLOCK_TOKENS = 16


def cache_config(layers: int, blocks: int, layout: str, heads: int = 2, head_size: int = 8, padding: int = 0) -> KVCacheConfig:
    """One group of equal layers, placed as vLLM places them. `padding` follows the last layer of each block."""
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=heads, head_size=head_size, dtype=torch.float32)
    names = [f"layers.{i}.attn" for i in range(layers)]
    page = spec.page_size_bytes
    if KVCacheLayout[layout].is_block_outermost:
        layer_stride, block_stride = page, layers * page + padding
        size = block_stride * blocks
    else:
        layer_stride, block_stride = page * blocks, page
        size = layer_stride * layers
    tensor = KVCacheTensor(size=size, layers=names, layer_stride=layer_stride, block_stride=block_stride)
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[tensor], kv_cache_groups=[KVCacheGroupSpec(names, spec)])


def cpu_tensors(config: KVCacheConfig, layout: str) -> dict[str, torch.Tensor]:
    """The layers' tensors, as vLLM makes them."""
    return allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout[layout])


class GpuTensor(torch.Tensor):
    """A CPU tensor with the address and the device of GPU memory. Its own bytes are not used."""

    shift: int
    gpu: int

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.gpu)

    def data_ptr(self) -> int:
        return super().data_ptr() + self.shift

    def untyped_storage(self) -> Any:
        storage = super().untyped_storage()
        return SimpleNamespace(data_ptr=lambda: storage.data_ptr() + self.shift, nbytes=storage.nbytes)


def gpu_tensors(tensors: dict[str, torch.Tensor], address: int, gpu: int = 0) -> dict[str, torch.Tensor]:
    """The same tensors at an address of GPU memory. All have one storage."""
    found = {}
    for name, tensor in tensors.items():
        there = torch.Tensor._make_subclass(GpuTensor, tensor)
        there.shift, there.gpu = address - tensor.untyped_storage().data_ptr(), gpu
        found[name] = there
    return found


def vllm_config(role: str, layout: str, *, sleep: bool = False, **extra: Any) -> Any:
    """The parts of a `VllmConfig` that the connector reads."""
    model = SimpleNamespace(
        model="m",
        revision=None,
        quantization=None,
        dtype="float32",
        seed=0,
        use_mla=False,
        enable_sleep_mode=sleep,
        get_total_num_kv_heads=lambda: 2,
        get_head_size=lambda: 8,
    )
    load = SimpleNamespace(load_format="dummy")
    cache = SimpleNamespace(cache_dtype="auto", get_resolved_kv_cache_layout=lambda: KVCacheLayout[layout])
    transfer = SimpleNamespace(kv_role=role, engine_id=role, kv_connector_extra_config=extra)
    parallel = SimpleNamespace(data_parallel_index=0, tensor_parallel_size=1, pipeline_parallel_size=1)
    return SimpleNamespace(
        model_config=model,
        cache_config=cache,
        kv_transfer_config=transfer,
        parallel_config=parallel,
        load_config=load,
        speculative_config=None,
    )


@contextmanager
def parallel_groups(tp: int = 1, pp: int = 1) -> Iterator[None]:
    """Rank 0 of this many ranks."""

    def group(size: int) -> Any:
        return lambda: SimpleNamespace(rank_in_group=0, world_size=size)

    state = "vllm.distributed.parallel_state"
    with mock.patch(f"{state}.get_tp_group", group(tp)), mock.patch(f"{state}.get_pp_group", group(pp)):
        yield
