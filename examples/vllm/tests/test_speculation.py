"""Speculative decoding on the decode engine."""

from conftest import Fleet, Start

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}


def test_a_decode_engine_speculates_on_a_loaded_prompt(start: Start, tiny: str, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    d = start("ngram-decode", tiny, "kv_consumer", llm={"speculative_config": NGRAM}).ready()
    free = d.state()["free"]
    # A prompt that repeats itself gives the drafts something to find.
    tokens = f.prompt(50) * 8
    done = d.generate("ngram", tokens, params=f.p.prefill("ngram", tokens), max_tokens=32)
    assert done["tokens"] == f.alone(tokens, max_tokens=32)
    assert d.metrics()["kvferry_loads{result=loaded}"] == 1
    assert d.settled()["free"] == free
    f.settled()
