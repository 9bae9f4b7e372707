"""Starts a prefill server, a decode server and a router on this machine, and completes a prompt through them. See
`examples/vllm/run`."""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import models
import servers

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvferry" / "vllm"


def main() -> None:
    # On SIGTERM too, the servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or the directory of a model")
    parser.add_argument("--prompt", default="Write one sentence about ferries.")
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--kill", action="store_true", help="then kill the prefill server and send the prompt again")
    parser.add_argument("--keep", action="store_true", help="keep the servers running until Ctrl-C")
    args = parser.parse_args()
    model = args.model if os.path.isdir(args.model) else str(models.make(args.model, CACHE / "models" / f"{args.model}-1"))
    logs = Path(tempfile.mkdtemp(prefix="kvferry-vllm-"))
    print(f"logs: {logs}", flush=True)
    prefill = servers.vllm("prefill", model, logs, servers.kvferry_config("kv_producer"))
    decode = servers.vllm("decode", model, logs, servers.kvferry_config("kv_consumer"))
    started = [prefill, decode]
    try:
        print("starting a prefill server and a decode server", flush=True)
        for s in started:
            s.start()
        for s in started:
            print(f"{s.healthy().name}: {s.url}", flush=True)
        router = servers.router([prefill.url], [decode.url], logs)
        started.append(router.start())
        print(f"router: {router.healthy().url}", flush=True)
        ask(router, decode, args, "first")
        if args.kill:
            prefill.kill()
            print("\nkilled the prefill server", flush=True)
            ask(router, decode, args, "after the kill")
        if args.keep:
            print("press Ctrl-C to stop the servers", flush=True)
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        for s in reversed(started):
            s.stop()


def metrics(server: servers.Process) -> dict[str, float]:
    """kvferry's metrics of a server, by name and labels."""
    found = {}
    for line in server.get("/metrics").splitlines():
        if line.startswith("vllm:kvferry_"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


def source(before: dict[str, float], after: dict[str, float], prompt: int) -> str:
    """Where a prompt's tokens came from, by the decode engine's metrics before and after it."""

    def lanes(name: str) -> dict[str, float]:
        """The growth of a metric, by lane."""
        grown = {k: v - before.get(k, 0) for k, v in after.items() if k.startswith(f"vllm:kvferry_{name}_total")}
        return {k.partition('lane="')[2].partition('"')[0]: n for k, n in grown.items() if n > 0}

    loaded = sum(lanes("tokens_loaded").values())
    if not loaded:
        return f"the decode engine prefilled all {prompt} prompt tokens itself: nothing came from a prefill engine"
    over = " and ".join(sorted(lanes("bytes_loaded")))
    came = f"{loaded:.0f} of {prompt} prompt tokens came from the prefill engine, over {over}"
    return came if loaded >= prompt else f"{came}; the decode engine computed the rest"


def ask(router: servers.Process, decode: servers.Process, args: argparse.Namespace, salt: str) -> None:
    before, began = metrics(decode), time.monotonic()
    # The salt keeps the decode engine from using its own cache of the same prompt.
    answer = servers.complete(router.url, args.prompt, args.max_tokens, cache_salt=salt)
    took = time.monotonic() - began
    print(f"\n{args.prompt}{answer['choices'][0]['text']}\n\nanswered in {took:.2f} s", flush=True)
    print(source(before, metrics(decode), answer["usage"]["prompt_tokens"]), flush=True)


if __name__ == "__main__":
    main()
