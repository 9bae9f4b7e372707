"""The params that routers pass on: kvferry's, another connector's, another request's, or none."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from conftest import Fleet, Start
from kvferry.vllm.params import prompt_fingerprint


def test_cached_blocks_are_not_pulled(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    prefix, tail = f.prompt(128), f.prompt(70)
    f.d.generate("hit-warm", prefix + f.prompt(8), max_tokens=1)
    params = f.p.prefill("hit", prefix + tail)
    before = f.d.metrics()["kvferry_blocks_loaded"]
    done = f.d.generate("hit", prefix + tail, params=params)
    assert done["tokens"] == f.alone(prefix + tail)
    assert done["computed"] == 1
    # 198 tokens are 7 blocks; 4 of them were cached.
    assert f.d.metrics()["kvferry_blocks_loaded"] - before == 3
    f.settled()


def test_a_full_cache_hit_releases_the_offer(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    for length in (129, 150):
        tokens = f.prompt(length)
        f.d.generate(f"full-warm-{length}", tokens + f.prompt(40), max_tokens=1)
        params = f.p.prefill(f"full-{length}", tokens)
        loads = f.d.metrics().get("kvferry_loads{result=loaded}", 0)
        released = f.p.metrics().get("kvferry_offers_ended{why=released}", 0)
        done = f.d.generate(f"full-{length}", tokens, params=params)
        assert done["tokens"] == f.alone(tokens)
        f.settled()
        assert f.p.metrics()["kvferry_offers_ended{why=released}"] == released + 1
        # 129 tokens: four blocks are cached, and the last token is always computed. 150 tokens: the fifth block is pulled.
        assert f.d.metrics().get("kvferry_loads{result=loaded}", 0) == loads + (length == 150)


def test_a_request_with_unusable_params_is_prefilled_here(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    foreign = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[1, 2, 3]],
        "remote_engine_id": "other",
        "remote_request_id": "r",
        "remote_host": "127.0.0.1",
        "remote_port": 5600,
        "tp_size": 1,
    }
    unusable = [
        foreign,
        {"do_remote_prefill": True},
        {"do_remote_prefill": True, "kvferry": None},
        {"do_remote_prefill": True, "kvferry": {"offer": "text"}},
        {"do_remote_prefill": True, "kvferry": {"offer": {"id": "zz", "tokens": -1}}},
        {"do_remote_prefill": "yes", "kvferry": {"offer": {"tokens": 1e300}}},
        {"something": "else"},
    ]
    for i, params in enumerate(unusable):
        tokens = f.prompt(100)
        done = f.d.generate(f"unusable-{i}", tokens, params=params)
        assert done["tokens"] == f.alone(tokens)
        assert done["computed"] == 100
    assert f.d.metrics()["kvferry_params_refused"] >= 6
    assert "is prefilled here: no kvferry offer" in f.d.log.read_text()
    f.settled()


def test_an_edited_offer_changes_no_answer(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    for i, change in enumerate(
        [
            lambda o: o.__setitem__("token", "0" * 31 + "1"),
            lambda o: o.__setitem__("id", "0" * 31 + "1"),
            lambda o: o.__setitem__("groups", [{"group": 0, "first_position": 0, "blocks": [1, 2, 3, 4]}]),
            lambda o: o.__setitem__("fingerprints", {}),
            lambda o: o.__setitem__("ranks", []),
            lambda o: o.__setitem__("engine", "somebody"),
            lambda o: o.__setitem__("tokens", 1 << 40),
            lambda o: o.__setitem__("tokens", 99),
            lambda o: o.__setitem__("version", 1),
            lambda o: o.__setitem__("extra", 1),
        ]
    ):
        tokens = f.prompt(100)
        params = f.p.prefill(f"any-{i}", tokens)
        good = copy.deepcopy(params)
        change(params["kvferry"]["offer"])
        done = f.d.generate(f"any-{i}", tokens, params=params)
        assert done["tokens"] == f.alone(tokens), i
        # The original offer would live until its lease ends: revoke it.
        f.p.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]")
        assert good["kvferry"]["offer"]["id"]
    f.settled()


def test_an_offer_of_another_prompt_is_not_used(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    params = f.p.prefill("another", f.prompt(100))
    tokens = f.prompt(100)
    done = f.d.generate("another", tokens, params=params)
    assert done["tokens"] == f.alone(tokens)
    assert "its offer belongs to another prompt" in f.d.log.read_text()
    f.p.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]")
    f.settled()


def test_an_offer_is_used_once(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    tokens = f.prompt(100)
    params = f.p.prefill("once", tokens)
    first = f.d.generate("once", tokens, params=params, salt="a")
    again = f.d.generate("twice", tokens, params=params, salt="b")
    assert first["tokens"] == again["tokens"] == f.alone(tokens)
    assert (first["computed"], again["computed"]) == (1, 100)
    f.settled()


def test_several_answers_to_one_prompt(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    tokens = f.prompt(100)
    params = f.p.prefill("several", tokens)
    done = f.d.generate("several", tokens, params=params, n=2)
    assert done["tokens"] == f.alone(tokens)
    f.settled()


def test_an_engine_logs_a_request_for_the_other_role(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    tokens = f.prompt(100)
    params = f.p.prefill("roles", tokens)
    # A decode engine receives a request for a remote decode, and a prefill engine a request with an offer.
    done = f.d.generate("roles-d", tokens, params={"do_remote_decode": True}, max_tokens=1)
    assert done["params"] is None
    assert "this engine does not offer" in f.d.log.read_text()
    done = f.p.generate("roles-p", tokens, params=params)
    assert done["tokens"] == f.alone(tokens)
    assert "this engine does not pull" in f.p.log.read_text()
    f.p.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]")
    f.settled()


def test_a_prefill_with_a_longer_answer_offers_its_prompt(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    tokens = f.prompt(90)
    done = f.p.generate("longer", tokens, params={"do_remote_decode": True}, max_tokens=12)
    assert done["params"]["remote_num_tokens"] == 90
    answer = f.d.generate("longer", tokens, params=done["params"])
    assert answer["tokens"] == f.alone(tokens)
    assert answer["computed"] == 1
    f.settled()


def test_a_name_with_another_prompts_fingerprint_loads_nothing_and_poisons_no_cache(tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    mine, theirs = f.prompt(100), f.prompt(100)
    params = f.p.prefill("forger", mine)
    other = f.p.prefill("victim", theirs)
    params["kvferry"]["offer"]["fingerprints"] = other["kvferry"]["offer"]["fingerprints"]
    done = f.d.generate("forged", theirs, params=params)
    assert done["tokens"] == f.alone(theirs) and done["computed"] == 100
    # An innocent request finds its prompt in the prefix cache.
    assert f.d.generate("innocent", theirs)["tokens"] == f.alone(theirs)
    f.p.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]")
    f.settled()


def test_engines_with_a_seal_key_use_sealed_names_only(
    start: Start, tiny: str, tiny_fleet: Fleet, tmp_path: Path
) -> None:
    f = tiny_fleet
    (tmp_path / "key").write_text("0123456789abcdef" * 4 + "\n")
    (tmp_path / "next").write_text("fedcba9876543210" * 4 + "\n")
    p = start("sealing", tiny, "kv_producer", seal_keys=[str(tmp_path / "key")]).ready()
    d = start("checking", tiny, "kv_consumer", seal_keys=f"{tmp_path / 'next'},{tmp_path / 'key'}").ready()
    tokens = f.prompt(100)
    done = d.generate("sealed", tokens, params=p.prefill("sealed", tokens))
    assert done["tokens"] == f.alone(tokens) and done["computed"] == 1
    tokens = f.prompt(100)
    unsealed = d.generate("unsealed", tokens, params=f.p.prefill("unsealed", tokens))
    assert unsealed["tokens"] == f.alone(tokens) and unsealed["computed"] == 100
    tokens = f.prompt(100)
    params = p.prefill("elsewhere", tokens)
    params["kvferry"]["offer"]["ranks"][0]["addr"] = "127.0.0.1:9"
    elsewhere = d.generate("elsewhere", tokens, params=params)
    assert elsewhere["tokens"] == f.alone(tokens) and elsewhere["computed"] == 100
    log = d.log.read_text()
    assert "is prefilled here: the kvferry offer is unusable: the offer is not sealed" in log
    assert "the offer's seal does not fit" in log
    for e in (p, f.p):
        e.python("[w.revoke(o) for w in [self.worker()._producer] for o in list(self.worker().offers.held)]")
    d.settled()
    p.settled()
    f.settled()


def test_prompts_with_other_embeddings_have_other_fingerprints() -> None:
    def of(ids: list[int] | None, embeds: Any = None, is_ids: Any = None, tokens: int = 4) -> str | None:
        request = SimpleNamespace(prompt_token_ids=ids, prompt_embeds=embeds, prompt_is_token_ids=is_ids, mm_features=[])
        return prompt_fingerprint(request, tokens)  # type: ignore[arg-type]

    ids, embeds = [1, 2, 3, 4, 5], torch.arange(10, dtype=torch.bfloat16).reshape(5, 2)
    other, tail = embeds.clone(), embeds.clone()
    other[1, 0], tail[4, 0] = 99, 99
    mask = [True, False, True, True, True]
    seen = [of(ids), of(None, embeds), of(None, other), of(ids, embeds, mask), of(ids, other, mask), of(ids, embeds, mask[::-1])]
    assert len(set(seen)) == len(seen) and None not in seen
    assert of(None) is None
    # Only the tokens of the offer count.
    assert of(None, tail) == of(None, embeds) != of(None, tail, tokens=5)
