"""The layout of the engine's tensors: regions, joined regions, and devices."""

from typing import Any

import fakes
import pytest
import torch

from kvferry import _native
from kvferry.vllm import pool, worker

LAYERS, BLOCKS = 4, 6


def described(layout: str, **more: Any) -> tuple[dict[str, torch.Tensor], pool.Cache]:
    config = fakes.cache_config(LAYERS, BLOCKS, layout, **more)
    tensors = fakes.cpu_tensors(config, layout)
    return tensors, pool.describe(tensors, config, layout)


def page(tensor: torch.Tensor) -> int:
    return tensor[0].numel() * tensor.element_size()


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_layers_outside_blocks_have_one_region_each(layout: str) -> None:
    tensors, cache = described(layout)
    ((_, kind, tokens, blocks, regions),) = cache.groups
    assert (kind, tokens, blocks, cache.layers, cache.packed) == ("full", fakes.BLOCK_TOKENS, BLOCKS, LAYERS, False)
    assert [r[0] for r in regions] == list(tensors)
    base = next(iter(tensors.values())).untyped_storage().data_ptr()
    for (_, segment, offset, bytes_, stride), tensor in zip(regions, tensors.values(), strict=True):
        assert (segment, base + offset, bytes_, stride) == (0, tensor.data_ptr(), page(tensor), page(tensor))


@pytest.mark.parametrize("padding", [0, 256])
@pytest.mark.parametrize("layout", ["BLHNC", "BLNHC"])
def test_layers_side_by_side_in_a_block_are_one_region(layout: str, padding: int) -> None:
    tensors, cache = described(layout, padding=padding)
    (segment,) = cache.segments
    ((_, _, _, _, regions),) = cache.groups
    ((_, _, offset, bytes_, stride),) = regions
    one = page(next(iter(tensors.values())))
    assert (offset, bytes_, stride) == (0, LAYERS * one, LAYERS * one + padding)
    assert (cache.layers, cache.packed) == (LAYERS, True)
    assert segment[1] == stride * BLOCKS
    # A block of the region has the bytes of all layers.
    for i, tensor in enumerate(tensors.values()):
        tensor.fill_(i + 1)
    raw = torch.empty(0, dtype=torch.uint8).set_(next(iter(tensors.values())).untyped_storage())
    block = raw[3 * stride : 3 * stride + bytes_].view(torch.float32).view(LAYERS, -1)
    assert [row.unique().tolist() for row in block] == [[1.0], [2.0], [3.0], [4.0]]


def test_only_layers_that_share_a_block_without_a_gap_are_joined() -> None:
    joined = pool.pack([("b", 0, 64, 64, 256), ("a", 0, 0, 64, 256), ("d", 0, 192, 32, 256), ("x", 1, 128, 64, 256)])
    assert [(r[1], r[2], r[3], r[4]) for r in joined] == [(0, 0, 128, 256), (0, 192, 32, 256), (1, 128, 64, 256)]
    assert [r[0] for r in joined[1:]] == ["d", "x"]
    # The next layer begins at the next block: the block ends at the stride.
    apart = [("a", 0, 0, 64, 64), ("b", 0, 64, 64, 64)]
    assert pool.pack(apart) == apart
    assert pool.pack([("a", 0, 0, 64, 128), ("b", 0, 64, 64, 192)]) == [("a", 0, 0, 64, 128), ("b", 0, 64, 64, 192)]


def test_the_name_of_a_joined_region_tells_layers_order_and_sizes() -> None:
    def name(*layers: tuple[str, int]) -> str:
        at, regions = 0, []
        for layer, bytes_ in layers:
            regions.append((layer, 0, at, bytes_, 1024))
            at += bytes_
        ((name, *_),) = pool.pack(regions)
        return name

    names = {
        name(("a", 64), ("b", 64), ("c", 64)),
        name(("a", 64), ("c", 64), ("b", 64)),
        name(("a", 64), ("b", 32), ("c", 96)),
        name(("a", 64), ("b", 64)),
        name(("a", 64), ("b", 64), ("d", 64)),
    }
    assert len(names) == 5
    assert name(("a", 64), ("b", 64)) == name(("a", 64), ("b", 64))
    assert max(map(len, names)) < 60


Side = tuple[_native.Identity, _native.Pool, dict[str, torch.Tensor]]


def identity(layout: str, role: str, tp: int = 1, pp: int = 1) -> Side:
    config = fakes.cache_config(LAYERS, BLOCKS, layout)
    tensors = fakes.cpu_tensors(config, layout)
    cache = pool.describe(tensors, config, layout)
    with fakes.parallel_groups(tp, pp):
        me = pool.identity(fakes.vllm_config(role, layout), tensors, cache, None, "")
    return me, _native.Pool(cache.segments, cache.groups, list(tensors.values())), tensors


def moved(producer: Side, consumer: Side) -> _native.Ended:
    """Pulls block 2 of a producer into block 4 of a consumer."""
    settings = _native.Settings(lanes=["local", "tcp"], deadline=10.0)
    p = _native.Producer(producer[0], producer[1], settings, "127.0.0.1:0")
    c = _native.Consumer(consumer[0], consumer[1], settings)
    try:
        incarnation = _native.engine_incarnation([p.incarnation])
        _, name = _native.name_offer(
            engine="kv_producer",
            incarnation=incarnation,
            ranks=[(0, p.incarnation, p.addr)],
            tokens=fakes.BLOCK_TOKENS,
            request="r",
            fingerprints={},
            seal_keys=[],
        )
        p.enter(name, [(0, 0, [2])])
        c.pull(name, [(0, 0, [4])])
        assert worker.quiet(c, 30)
        (ended,) = c.poll()
        return ended
    finally:
        c.close(5)
        p.close(5)


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC", "BLNHC"])
def test_engines_of_one_layout_exchange_blocks(layout: str) -> None:
    producer, consumer = identity(layout, "kv_producer"), identity(layout, "kv_consumer")
    for i, tensor in enumerate(producer[2].values()):
        tensor.normal_()
        consumer[2][f"layers.{i}.attn"].fill_(i)
    ended = moved(producer, consumer)
    assert ended.loaded == 1 and not ended.invalid, ended.causes
    for i, (name, theirs) in enumerate(producer[2].items()):
        ours = consumer[2][name]
        assert torch.equal(ours[4], theirs[2])
        assert all((ours[b] == i).all() for b in range(BLOCKS) if b != 4)


@pytest.mark.parametrize(
    ("producer", "consumer"),
    [
        (("BLHNC", 1, 1), ("LBHNC", 1, 1)),
        (("LBHNC", 1, 1), ("BLHNC", 1, 1)),
        (("BLHNC", 2, 1), ("BLHNC", 1, 1)),
        (("BLHNC", 1, 1), ("BLHNC", 2, 1)),
        (("BLHNC", 1, 2), ("BLHNC", 1, 1)),
    ],
    ids=lambda x: "-".join(map(str, x)),
)
def test_engines_that_pack_differently_refuse_each_other(producer: Any, consumer: Any) -> None:
    ours = identity(consumer[0], "kv_consumer", *consumer[1:])
    for tensor in ours[2].values():
        tensor.fill_(7)
    ended = moved(identity(producer[0], "kv_producer", *producer[1:]), ours)
    assert (ended.loaded, ended.causes) == (0, {"refused": 1})
    assert all((tensor == 7).all() for tensor in ours[2].values())


def test_a_joined_region_of_other_layers_is_refused() -> None:
    """The handshake agrees, as with a draft model on one side only."""
    theirs, ours = identity("BLHNC", "kv_producer"), identity("BLHNC", "kv_consumer")
    config = fakes.cache_config(LAYERS, BLOCKS, "BLHNC")
    config.kv_cache_groups[0].layer_names[:] = config.kv_cache_groups[0].layer_names[::-1]
    tensors = dict(zip(reversed(theirs[2]), theirs[2].values(), strict=True))
    cache = pool.describe(tensors, config, "BLHNC")
    memory = _native.Pool(cache.segments, cache.groups, list(tensors.values()))
    for tensor in ours[2].values():
        tensor.fill_(7)
    ended = moved((theirs[0], memory, tensors), ours)
    assert (ended.loaded, ended.causes) == (0, {"bad_offer": 1})
    assert all((tensor == 7).all() for tensor in ours[2].values())


def refused(tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(pool.Unsupported) as e:
        pool.describe(tensors, fakes.cache_config(LAYERS, BLOCKS, "LBHNC"), "LBHNC")
    return str(e.value)


def test_a_cache_on_one_gpu_is_described_by_its_addresses() -> None:
    config = fakes.cache_config(LAYERS, BLOCKS, "LBHNC")
    host = fakes.cpu_tensors(config, "LBHNC")
    cache = pool.describe(fakes.gpu_tensors(host, 0x7F00_0000_0000, gpu=1), config, "LBHNC")
    on_host = pool.describe(host, config, "LBHNC")
    assert cache.segments == [(0x7F00_0000_0000, on_host.segments[0][1])]
    assert cache.groups == on_host.groups
    assert (cache.device, cache.on_gpu, on_host.on_gpu) == (torch.device("cuda", 1), True, False)


def test_a_cache_on_several_devices_is_refused() -> None:
    host = fakes.cpu_tensors(fakes.cache_config(LAYERS, BLOCKS, "LBHNC"), "LBHNC")
    first = fakes.gpu_tensors(host, 1 << 40, gpu=0)
    mixed = {**first, "layers.1.attn": fakes.gpu_tensors(host, 1 << 41, gpu=1)["layers.1.attn"]}
    assert refused(mixed) == "the cache lies on several devices (cuda:0, cuda:1): a rank's cache must lie on one"
    mixed["layers.1.attn"] = host["layers.1.attn"]
    assert "(cpu, cuda:0)" in refused(mixed)


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    host = fakes.cpu_tensors(fakes.cache_config(LAYERS, BLOCKS, "LBHNC"), "LBHNC")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "the cache is on cuda:0, an AMD GPU" in refused(fakes.gpu_tensors(host, 1 << 40))
    monkeypatch.setattr(fakes.GpuTensor, "device", torch.device("xpu", 0))
    assert "the cache is on xpu:0" in refused(fakes.gpu_tensors(host, 1 << 40))
