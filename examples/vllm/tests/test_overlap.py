"""Decode engines that load a prompt while it is still computed."""

import itertools
import threading
import time
from typing import Any

import pytest
from conftest import Fleet, Start, prompt
from driver import LIMIT, Engine
from servers import free_port

BLOCK = 32
# A step computes 128 tokens, so a prompt takes many.
CHUNK = 128
CHUNKED = {"max_num_batched_tokens": CHUNK, "enable_chunked_prefill": True}
NUMBERS = itertools.count()


def transfer_id() -> str:
    return f"xfer-{next(NUMBERS):032x}"


class Pair:
    """A prefill engine with a bootstrap endpoint, and a decode engine."""

    def __init__(self, p: Engine, d: Engine, bootstrap: int) -> None:
        self.p, self.d, self.bootstrap = p, d, f"http://127.0.0.1:{bootstrap}"
        for e in (p, d):
            e.ready()
        self.free = (p.state()["free"], d.state()["free"])

    def prefill_params(self, transfer: str) -> dict[str, Any]:
        return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer}

    def decode_params(self, transfer: str) -> dict[str, Any]:
        return {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": transfer,
            "remote_bootstrap_addr": self.bootstrap,
            "remote_engine_id": "some-engine",
        }

    def send(self, name: str, tokens: list[int], **more: Any) -> None:
        """Sends a prompt to both engines, the decode engine first: it must wait."""
        transfer = transfer_id()
        self.d.add(name, tokens, params=self.decode_params(transfer), **more)
        self.p.add(name, tokens, params=self.prefill_params(transfer), max_tokens=1)

    def settled(self) -> None:
        assert (self.p.settled()["free"], self.d.settled()["free"]) == self.free


@pytest.fixture(scope="module")
def pair(start_shared: Start, tiny: str) -> Pair:
    port = free_port()
    p = start_shared("overlap-prefill", tiny, "kv_producer", bootstrap_port=port, llm=CHUNKED)
    d = start_shared("overlap-decode", tiny, "kv_consumer")
    return Pair(p, d, port)


def test_a_prompt_is_loaded_while_it_is_computed(pair: Pair, tiny_fleet: Fleet) -> None:
    f = tiny_fleet
    for length in (1, 20, 128, 129, 700, 1500):
        tokens = f.prompt(length)
        pair.send(f"good-{length}", tokens)
        done = pair.d.wait("done", f"good-{length}")
        assert done["tokens"] == f.alone(tokens)
        assert done["computed"] == 1
        pair.p.wait("done", f"good-{length}")
    pair.settled()
