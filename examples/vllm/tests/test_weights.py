"""KV of other weights: neither a retrained model of the same name and shape nor another LoRA adapter of the same name may be loaded.
"""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from conftest import CACHE, Fleet, Start
from driver import LIMIT, PREFILL, Engine
from kvferry.vllm import core, weights
from safetensors.torch import save_file


def model(path: Path, **more: Any) -> Any:
    """The parts of a `VllmConfig` that a fingerprint reads."""
    given = dict(model=str(path), revision=None, quantization=None, dtype="float32", hf_config=None) | more
    load = SimpleNamespace(load_format="auto")
    return SimpleNamespace(model_config=SimpleNamespace(**given), load_config=load, speculative_config=None)


def shards(path: Path, seed: int = 1) -> Path:
    path.mkdir()
    dice = torch.Generator().manual_seed(seed)
    for i in range(3):
        save_file({f"w{i}": torch.randn(512, 512, generator=dice)}, path / f"model-{i}.safetensors")
    return path


def test_equal_weights_have_one_fingerprint_wherever_they_lie(tmp_path: Path) -> None:
    one, two = shards(tmp_path / "one"), tmp_path / "two"
    shutil.copytree(one, two)
    (two / "README.md").write_text("another host")
    assert weights.of_engine(model(one)) == weights.of_engine(model(two))


def test_other_weights_of_equal_shapes_have_another_fingerprint(tmp_path: Path) -> None:
    one, two = shards(tmp_path / "one"), shards(tmp_path / "two", seed=2)
    names = [sorted(p.name for p in d.iterdir()) for d in (one, two)]
    sizes = [[p.stat().st_size for p in sorted(d.iterdir())] for d in (one, two)]
    assert names[0] == names[1] and sizes[0] == sizes[1]
    assert weights.of_engine(model(one)) != weights.of_engine(model(two))


def test_a_changed_configuration_has_another_fingerprint(tmp_path: Path) -> None:
    path = shards(tmp_path / "one")

    def config(**given: Any) -> Any:
        return SimpleNamespace(to_dict=lambda: {"_name_or_path": "anywhere", **given})

    plain = weights.of_engine(model(path, hf_config=config(rope_theta=1e4)))
    assert plain != weights.of_engine(model(path, hf_config=config(rope_theta=1e6)))
    assert plain != weights.of_engine(model(path, hf_config=config(rope_theta=1e4), quantization="fp8"))


def test_a_draft_model_with_a_cache_counts(tmp_path: Path) -> None:
    config, draft = model(shards(tmp_path / "one")), shards(tmp_path / "draft", seed=3)
    plain = weights.of_engine(config)

    def with_draft(method: str) -> str:
        config.speculative_config = SimpleNamespace(method=method, draft_model_config=model(draft).model_config)
        return weights.of_engine(config)

    assert with_draft("ngram") == plain
    assert with_draft("eagle") != plain


def test_a_hundred_gigabytes_are_sampled_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.mkdir()
    for i in range(20):
        header = json.dumps({"w": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}).encode()
        with (path / f"model-{i:02}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            # A file with a hole: only what is read costs time.
            file.truncate(5 << 30)
    before = time.process_time()
    first = weights.of_engine(model(path))
    assert time.process_time() - before < 5, "the bound of 1 s, with slack for a loaded machine"
    with (path / "model-07.safetensors").open("r+b") as file:
        file.seek(0, 2)
        file.seek(file.tell() - 3)
        file.write(b"x")
    assert weights.of_engine(model(path)) != first


def request(path: Path, **more: Any) -> Any:
    given: dict[str, Any] = dict(lora_name="a", lora_int_id=1, lora_path=str(path), load_inplace=False)
    return SimpleNamespace(**given | more)


def test_an_adapters_fingerprint_is_that_of_the_weights_in_memory(tmp_path: Path) -> None:
    path, adapters = tmp_path / "adapter", weights.Adapters()
    models.adapter(path, seed=1)
    first = adapters.fingerprint(request(path))
    assert adapters.fingerprint(request(path)) == first
    models.adapter(path, seed=2)
    # Nobody has told the engine: it computes with the old weights, or with the new ones once it reads them again.
    with pytest.raises(weights.Unknown, match="have changed since they were loaded"):
        adapters.fingerprint(request(path))
    adapters.loading(request(path, load_inplace=True))
    second = adapters.fingerprint(request(path))
    assert second != first
    assert adapters.is_stale(request(path)), "the prefix cache may hold KV of the first weights"
    adapters.cache_reset()
    assert not adapters.is_stale(request(path))


def test_an_adapter_that_is_removed_and_loaded_again_is_read_again(tmp_path: Path) -> None:
    path, adapters = tmp_path / "adapter", weights.Adapters()
    models.adapter(path, seed=1)
    first = adapters.fingerprint(request(path))
    adapters.removing(1)
    models.adapter(path, seed=2)
    assert adapters.fingerprint(request(path, lora_int_id=2)) != first
    assert adapters.is_stale(request(path, lora_int_id=2))


def test_an_adapter_without_files_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(weights.Unknown, match="cannot be read"):
        weights.Adapters().fingerprint(request(tmp_path / "none"))


@pytest.mark.parametrize("name", ["reload_weights", "update_weights", "finish_weight_update", "update_weight", "load_weights"])
def test_calls_that_replace_weights_are_counted(name: str) -> None:
    assert core.replaces_weights(name)


@pytest.mark.parametrize("name", ["get_weight_norm", "compute_weight_checksums", "profile", "add_lora", "check_weights"])
def test_calls_that_read_weights_are_not(name: str) -> None:
    assert not core.replaces_weights(name)


# ---- on the real engine -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.make("tiny-retrained", CACHE / "models" / "tiny-retrained-1"))


def test_a_retrained_model_of_the_same_name_is_refused_and_poisons_no_cache(
    start: Start, tiny: str, retrained: str, tiny_fleet: Fleet
) -> None:
    f = tiny_fleet
    p = start("retrained-prefill", retrained, "kv_producer", model_id="tiny").ready()
    d = start("same-name-decode", tiny, "kv_consumer", model_id="tiny").ready()
    free = p.state()["free"]
    for i in range(4):
        tokens = f.prompt(300)
        done = d.generate(f"swapped-{i}", tokens, params=p.prefill(f"swapped-{i}", tokens))
        assert done["tokens"] == f.alone(tokens) and done["computed"] == 300
        # The same prompt finds the prefix cache of the first one.
        assert d.generate(f"innocent-{i}", tokens)["tokens"] == f.alone(tokens)
    assert p.settled()["free"] == free, "what is refused is released"
    assert p.metrics()["kvferry_offers_ended{why=released}"] == 4
    assert d.metrics()["kvferry_mismatches{part=weights}"] == 4
    log = d.log.read_text()
    assert log.count("its KV was computed with other weights") == 1, "one line a minute"
    assert log.count("were refused (weights)") == 1


LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}


def lora(path: Path, **more: Any) -> dict[str, Any]:
    return {"lora_name": "style", "lora_int_id": 1, "lora_path": str(path)} | more


def test_answers_with_adapters_are_right_whichever_weights_each_side_has(
    start: Start, tiny: str, tiny_fleet: Fleet, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    models.adapter(one, seed=1)
    models.adapter(two, seed=2)
    engines = {role: start(f"lora-{role}", tiny, role, llm=LORA) for role in ("kv_producer", "kv_consumer")}
    mono = start("lora-mono", tiny, llm=LORA).ready()
    p, d = engines["kv_producer"].ready(), engines["kv_consumer"].ready()

    def alone(tokens: list[int], path: Path) -> list[int]:
        mono.python("self.core.reset_prefix_cache()")
        return mono.generate(f"alone-{time.monotonic_ns()}", tokens, lora=lora(path, lora_int_id=1 + (path == two)))["tokens"]

    def both(name: str, tokens: list[int], there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
        params = p.generate(name, tokens, max_tokens=1, params=PREFILL, lora=there)["params"]
        return d.generate(name, tokens, params=params, lora=here)

    tokens = tiny_fleet.prompt(300)
    done = both("equal", tokens, lora(one), lora(one))
    assert done["tokens"] == alone(tokens, one) != tiny_fleet.alone(tokens)
    assert done["computed"] == 1, "equal adapters are loaded"

    # One name, other weights.
    tokens = tiny_fleet.prompt(300)
    done = both("other", tokens, lora(two, lora_int_id=2), lora(one))
    assert done["tokens"] == alone(tokens, one) and done["computed"] == 300
    assert d.generate("after other", tokens, lora=lora(one))["tokens"] == alone(tokens, one)

    # Without an adapter on one side.
    tokens = tiny_fleet.prompt(300)
    params = p.prefill("none", tokens)
    done = d.generate("none", tokens, params=params, lora=lora(one))
    assert done["tokens"] == alone(tokens, one) and done["computed"] == 300

    # Replaced in place on the prefill side, then on both.
    shared = tmp_path / "shared"
    shutil.copytree(one, shared)
    before = tiny_fleet.prompt(300)
    assert both("before", before, lora(shared, lora_int_id=3), lora(shared, lora_int_id=3))["computed"] == 1
    shutil.rmtree(shared)
    shutil.copytree(two, shared)
    load = f"self.core.add_lora(__import__('vllm.lora.request', fromlist=['*']).LoRARequest('style', 3, {str(shared)!r}, load_inplace=True))"
    p.python(load)
    tokens = tiny_fleet.prompt(300)
    done = both("in place there", tokens, lora(shared, lora_int_id=3), lora(shared, lora_int_id=3))
    assert done["computed"] == 300, "the decode side has the old weights, and its files have changed since"
    d.python(load)
    tokens = tiny_fleet.prompt(300)
    done = both("in place on both", tokens, lora(shared, lora_int_id=3), lora(shared, lora_int_id=3))
    assert done["tokens"] == alone(tokens, two) and done["computed"] == 1
    # The prefill engine's prefix cache has this prompt's KV of the old weights: it is not offered.
    params = p.generate("stale", before, max_tokens=1, params=PREFILL, lora=lora(shared, lora_int_id=3))["params"]
    assert params is None and "may be of weights that were replaced" in p.log.read_text()
    p.settled()
    d.settled()


def wait_for_log(engine: Engine, text: str) -> None:
    until = time.monotonic() + LIMIT
    while text not in engine.log.read_text():
        assert time.monotonic() < until, engine.tail()
        time.sleep(0.05)


def test_weights_replaced_in_place_on_one_side_are_noticed(start: Start, tiny: str, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    p = start("updated-prefill", tiny, "kv_producer").ready()
    d = start("updated-decode", tiny, "kv_consumer").ready()
    warm = f.prompt(300)
    assert d.generate("warm", warm, params=p.prefill("warm", warm))["computed"] == 1
    p.python("self.core.collective_rpc('reload_weights') and None")
    assert p.generate("cached", warm, max_tokens=1, params=PREFILL)["params"] is None, "its prefix is of before the update"
    tokens = f.prompt(300)
    done = d.generate("one side", tokens, params=p.prefill("one side", tokens))
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 300
    d.python("self.core.collective_rpc('reload_weights') and None")
    tokens = f.prompt(300)
    done = d.generate("both sides", tokens, params=p.prefill("both sides", tokens))
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 1
    assert p.python("self.core.reset_prefix_cache()") is True
    assert p.generate("reset", warm, max_tokens=1, params=PREFILL)["params"] is not None
    p.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]")
    p.settled()
    d.settled()
