"""The layout of the engine's KV tensors in memory, and the identity of a rank.

A layer's tensor is cut into blocks along its first dimension, and a block is transferred as opaque bytes. A cache that
kvferry cannot transfer this way raises `Unsupported`; the engine then prefills every prompt itself.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, SlidingWindowSpec

from kvferry import _native

try:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs
except ImportError:  # Missing in some versions of vLLM.
    UniformTypeKVCacheSpecs = ()  # type: ignore[assignment, misc]

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# A layout that keeps each head's bytes of a block together: ranks of another tensor-parallel size can read their heads.
BY_HEAD = "LBHNC"

# `(name, segment, offset, block bytes, stride)`.
Region = tuple[str, int, int, int, int]
# `(id, kind, tokens of a block, blocks, regions)`.
Group = tuple[int, str, int, int, list[Region]]


class Unsupported(ValueError):
    """A cache that kvferry cannot transfer. `reason`: the value of the gauge `kvferry_up`'s label."""

    reason = "unsupported_cache"


class UnsupportedKind(Unsupported):
    """A kind of cache that kvferry does not transfer, whatever the settings."""

    reason = "unsupported_cache_kind"


def transfer_groups(config: KVCacheConfig) -> tuple[int, ...]:
    """The cache groups that are transferred. Some versions of vLLM let an engine exclude groups."""
    ids = getattr(config, "transfer_group_ids", None)
    return tuple(ids) if ids is not None else tuple(range(len(config.kv_cache_groups)))


def group_kind(spec: KVCacheSpec) -> str:
    """kvferry's name for the attention of a group's layers."""
    if UniformTypeKVCacheSpecs and isinstance(spec, UniformTypeKVCacheSpecs):
        kinds = {group_kind(s) for s in spec.kv_cache_specs.values()}
        if len(kinds) != 1:
            raise Unsupported(f"a cache group mixes {sorted(kinds)}")
        return kinds.pop()
    if isinstance(spec, SlidingWindowSpec):
        return "sliding_window"
    if isinstance(spec, FullAttentionSpec):
        return "full"
    raise UnsupportedKind(
        f"{type(spec).__name__} caches are not supported (full and sliding window attention are): "
        "the decode engine prefills this model's prompts"
    )


def windowed(spec: KVCacheSpec) -> bool:
    """Whether a group's layers use a sliding window."""
    try:
        return group_kind(spec) == "sliding_window"
    except Unsupported:
        return False


@dataclass(frozen=True)
class Cache:
    """A rank's KV memory, as `_native.Pool` describes it."""

    segments: list[tuple[int, int]]
    groups: list[Group]
    # Where all segments are.
    device: torch.device
    # Number of layers with a tensor.
    layers: int
    # Whether layers that are neighbours in a block are one region.
    packed: bool

    @property
    def on_gpu(self) -> bool:
        """Whether the memory is on a CUDA device."""
        return self.device.type == "cuda"


def packs(layout: str) -> bool:
    """Whether a layout puts a block's layers side by side: its outermost dimension is the block."""
    return layout.startswith("B")


def pack(regions: list[Region]) -> list[Region]:
    """Joins the layers that lie side by side in each block: one read then takes them all. A joined region's name tells its
    layers, their order and their sizes, so that a peer with other ones has no region of this name."""
    runs: list[list[Region]] = []
    for region in sorted(regions, key=lambda r: (r[1], r[4], r[2])):
        if runs and _adjacent(runs[-1], region):
            runs[-1].append(region)
        else:
            runs.append([region])
    return [_joined(run) for run in runs]


def _adjacent(run: list[Region], region: Region) -> bool:
    (_, segment, start, _, stride), (_, _, last, last_bytes, _) = run[0], run[-1]
    _, its_segment, offset, bytes_, its_stride = region
    side_by_side = (its_segment, its_stride) == (segment, stride) and offset == last + last_bytes
    # Past the stride, the next block begins.
    return side_by_side and offset + bytes_ - start <= stride


def _joined(run: list[Region]) -> Region:
    name, segment, offset, _, stride = run[0]
    if len(run) == 1:
        return run[0]
    layers = "\0".join(f"{r[0]}={r[3]}" for r in run)
    digest = hashlib.blake2b(layers.encode(), digest_size=8).hexdigest()
    return (f"{name} and {len(run) - 1} more ({digest})", segment, offset, sum(r[3] for r in run), stride)


def check_device(devices: set[torch.device]) -> torch.device:
    """The device of a cache."""
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices)))
        raise Unsupported(f"the cache lies on several devices ({names}): a rank's cache must lie on one")
    (device,) = devices
    if device.type == "cuda" and torch.version.hip is not None:
        raise Unsupported(f"the cache is on {device}, an AMD GPU: host memory and NVIDIA GPUs are supported")
    if device.type not in ("cpu", "cuda"):
        raise Unsupported(f"the cache is on {device}: host memory and NVIDIA GPUs are supported")
    return device


def layer_region(name: str, tensor: torch.Tensor, num_blocks: int, segment: int, base: int) -> Region:
    """`(name, segment, offset, block bytes, stride)` of one layer's blocks."""
    if tensor.ndim < 2 or tensor.shape[0] == 0 or tensor.shape[0] % num_blocks:
        raise Unsupported(f"{name}: shape {tuple(tensor.shape)} does not divide into {num_blocks} blocks")
    # The attention kernel may divide a block into several smaller ones.
    parts = tensor.shape[0] // num_blocks
    part = tensor[0]
    size = part.element_size()
    extent = 1 + sum((n - 1) * s for n, s in zip(part.shape, part.stride(), strict=True))
    if extent != part.numel():
        raise Unsupported(f"{name}: the bytes of a block are not contiguous (strides {tensor.stride()})")
    stride = tensor.stride(0) * size
    bytes_ = part.numel() * size
    if parts > 1 and stride != bytes_:
        raise Unsupported(f"{name}: a block's {parts} parts are not contiguous")
    return (name, segment, tensor.data_ptr() - base, bytes_ * parts, stride * parts)


def describe(kv_caches: dict[str, torch.Tensor], config: KVCacheConfig, layout: str) -> Cache:
    """Describes the tensors that are transferred. `layout` is the engine's cache layout."""
    segments: list[tuple[int, int]] = []
    number: dict[int, int] = {}
    groups: list[Group] = []
    devices: set[torch.device] = set()
    layers = 0
    for gid in transfer_groups(config):
        group = config.kv_cache_groups[gid]
        kind = group_kind(group.kv_cache_spec)
        regions: list[Region] = []
        for name in group.layer_names:
            # A layer that shares another layer's cache has no tensor.
            if (tensor := kv_caches.get(name)) is None:
                continue
            if not isinstance(tensor, torch.Tensor):
                raise Unsupported(f"{name}: its cache is not a single tensor")
            devices.add(tensor.device)
            storage = tensor.untyped_storage()
            base = storage.data_ptr()
            if base not in number:
                number[base] = len(segments)
                segments.append((base, storage.nbytes()))
            regions.append(layer_region(name, tensor, config.num_blocks, number[base], base))
        if not regions:
            raise Unsupported(f"cache group {gid} has no tensors")
        layers += len(regions)
        regions = pack(regions) if packs(layout) else regions
        groups.append((gid, kind, group.kv_cache_spec.block_size, config.num_blocks, regions))
    return Cache(segments, groups, check_device(devices), layers, packs(layout))


def heads_of(total: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """The KV heads of a rank as `(first, count)`. With more ranks than heads, each head has several copies."""
    if total >= tp_size:
        per_rank = total // tp_size
        return tp_rank * per_rank, per_rank
    return tp_rank * total // tp_size, 1


def layout_name(config: "VllmConfig") -> str:
    """The cache layout that the engine chose."""
    resolved = getattr(config.cache_config, "get_resolved_kv_cache_layout", None)
    return str(getattr(resolved(), "name", resolved())) if resolved else "unknown"


def identity(
    config: "VllmConfig", kv_caches: dict[str, torch.Tensor], cache: Cache, model_id: str | None, weights: str
) -> _native.Identity:
    """The identity of a rank. Peers with another meaning of the KV bytes refuse each other."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    tp, pp = get_tp_group(), get_pp_group()
    model, groups, layers = config.model_config, cache.groups, cache.layers
    cache_dtype = str(config.cache_config.cache_dtype)
    total = 1 if getattr(model, "use_mla", False) else model.get_total_num_kv_heads()
    layout = layout_name(config)
    tensor = next(iter(kv_caches.values()))
    attention = [layout, f"head_size={model.get_head_size()}"]
    if getattr(model, "use_mla", False):
        attention.append("mla")
    elif layout != BY_HEAD:
        # A head's bytes are not contiguous: only ranks of the same tensor-parallel size can read them.
        attention.append(f"tp={tp.world_size}")
    if cache.packed:
        # A region holds all layers of a pipeline stage: only engines with the same stages can read it.
        attention.append(f"packed pp={pp.world_size}")
    attention += [f"{g[0]}:{g[1]}:{g[2]}" for g in groups[1:]]
    assert config.kv_transfer_config is not None
    return _native.Identity(
        engine=str(config.kv_transfer_config.engine_id),
        rank=pp.rank_in_group * tp.world_size + tp.rank_in_group,
        tp=(tp.rank_in_group, tp.world_size),
        pp=(pp.rank_in_group, pp.world_size),
        heads=heads_of(total, tp.rank_in_group, tp.world_size),
        layers=(pp.rank_in_group * layers, layers),
        model=model_id or str(model.model),
        dtype=f"{tensor.dtype}".removeprefix("torch."),
        scales="" if cache_dtype == "auto" else cache_dtype,
        weights=weights,
        attention=" ".join(attention),
        block_tokens=groups[0][2],
    )
