"""kvferry for Python: KV-cache transfer that says, block by block, what arrived.

`kvferry.vllm` is the vLLM connector. `kvferry._native` holds the bindings that it uses.
"""
