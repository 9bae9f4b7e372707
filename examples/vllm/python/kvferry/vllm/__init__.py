"""kvferry as a KV connector of vLLM.

`--kv-transfer-config '{"kv_connector":"KvFerryConnector","kv_connector_module_path":"kvferry.vllm","kv_role":"kv_consumer"}'`
"""

from kvferry.vllm.connector import KvFerryConnector

__all__ = ["KvFerryConnector"]
