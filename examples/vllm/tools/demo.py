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
        for s in started:
            s.start()
        for s in started:
            print(f"{s.healthy().name}: {s.url}", flush=True)
        router = servers.router([prefill.url], [decode.url], logs)
        started.append(router.start())
        print(f"router: {router.healthy().url}", flush=True)
        ask(router, decode, args)
        if args.kill:
            prefill.kill()
            print("killed the prefill server", flush=True)
            ask(router, decode, args)
        if args.keep:
            print("press Ctrl-C to stop the servers", flush=True)
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        for s in reversed(started):
            s.stop()


def ask(router: servers.Process, decode: servers.Process, args: argparse.Namespace) -> None:
    began = time.monotonic()
    answer = servers.complete(router.url, args.prompt, args.max_tokens)
    print(f"\n{args.prompt}{answer['choices'][0]['text']}\n\nanswered in {time.monotonic() - began:.2f} s", flush=True)
    wanted = ("kvferry_loads_total", "kvferry_bytes_loaded_total", "kvferry_tokens_loaded_total")
    for line in decode.get("/metrics").splitlines():
        if line.startswith("vllm:") and any(w in line for w in wanted):
            print(line, flush=True)


if __name__ == "__main__":
    main()
