"""A pair of HTTP servers behind the router, as an operator runs them."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers

PROMPTS = [f"[{i}] " + "The quick brown fox jumps over the lazy dog. " * n for i, n in enumerate((1, 3, 9, 20))]


@pytest.fixture(scope="module")
def site(tiny: str, log_dir: Path) -> Iterator[dict[str, servers.Process]]:
    ports = [servers.free_port() for _ in range(3)]
    there = servers.kvferry_config("kv_producer", port=ports[0], bootstrap_port=ports[1])
    prefill = servers.vllm("http-prefill", tiny, log_dir, there)
    here = servers.kvferry_config("kv_consumer", bootstrap_port=ports[2])
    decode = servers.vllm("http-decode", tiny, log_dir, here)
    known = [f"{prefill.url} {ports[1]}"], [f"{decode.url} {ports[2]}"]
    site = {
        "prefill": prefill,
        "decode": decode,
        "router": servers.router([prefill.url], [decode.url], log_dir),
        "router --overlap": servers.router(*known, log_dir, "--overlap"),
        "vllm-router nixl": servers.vllm_router([prefill.url], [decode.url], log_dir, "nixl"),
        "vllm-router mooncake": servers.vllm_router(known[0], [decode.url], log_dir, "mooncake"),
    }
    try:
        for s in site.values():
            s.start()
        for s in site.values():
            s.healthy()
        yield site
    finally:
        for s in site.values():
            s.kill()


def metric(server: servers.Process, name: str) -> float:
    lines = [line for line in server.get("/metrics").splitlines() if line.startswith(f"vllm:kvferry_{name}")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def texts(url: str, salt: str) -> list[str]:
    return [servers.complete(url, p, cache_salt=salt)["choices"][0]["text"] for p in PROMPTS]


def test_the_router_gives_the_answer_of_one_engine(site: dict[str, servers.Process]) -> None:
    alone = texts(site["decode"].url, "alone")
    assert texts(site["router"].url, "pair") == alone
    assert metric(site["decode"], "loads_total{") == len(PROMPTS)
    assert metric(site["decode"], "tokens_loaded_total") > 1000
    assert metric(site["decode"], "tokens_recomputed_total") == 0
    assert metric(site["decode"], "peers_up{") == 1
    # The release of the last offer may come after its answer.
    until = time.monotonic() + 20
    while metric(site["prefill"], "offers_ended_total{") < len(PROMPTS):
        assert time.monotonic() < until, "the last offer does not end"
        time.sleep(0.05)
    assert metric(site["prefill"], "offers_ended_total{") == len(PROMPTS)
    # Names and labels follow vLLM's own metrics.
    line = next(x for x in site["decode"].get("/metrics").splitlines() if x.startswith("vllm:kvferry_bytes_loaded_total"))
    assert 'engine="0"' in line and 'model_name="model"' in line and 'lane="local"' in line


@pytest.mark.parametrize("router", ["router --overlap", "vllm-router nixl", "vllm-router mooncake"])
def test_other_routers_give_the_answer_of_one_engine(site: dict[str, servers.Process], router: str) -> None:
    alone = texts(site["decode"].url, "alone")
    loads, recomputed = metric(site["decode"], "loads_total{"), metric(site["decode"], "tokens_recomputed_total")
    for i in range(5):
        assert texts(site[router].url, f"{router} {i}") == alone
    assert metric(site["decode"], "loads_total{") == loads + 5 * len(PROMPTS)
    assert metric(site["decode"], "tokens_recomputed_total") == recomputed
    parts = list(servers.stream(site[router].url, PROMPTS[2], cache_salt=f"{router} stream"))
    assert "".join(parts) == alone[2]
    assert metric(site["decode"], "loads_total{") == loads + 5 * len(PROMPTS) + 1


def test_a_killed_prefill_server_costs_no_answer(site: dict[str, servers.Process]) -> None:
    alone = texts(site["decode"].url, "alone again")
    site["prefill"].kill()
    assert texts(site["router"].url, "no prefill") == alone
    assert texts(site["router --overlap"].url, "no prefill, overlap") == alone
    site["prefill"].start().healthy()
    loads = metric(site["decode"], "loads_total{")
    assert texts(site["router"].url, "back") == alone
    # The next requests load from the restarted server.
    assert metric(site["decode"], "loads_total{") == loads + len(PROMPTS)
    # The other router asks again every 5 s. Until then it sends one request after the other. The first prompt may meet the decode
    # server's answer from before the restart.
    assert texts(site["router --overlap"].url, "back, overlap") == alone
    assert metric(site["decode"], "loads_total{") in (loads + 2 * len(PROMPTS) - 1, loads + 2 * len(PROMPTS))
