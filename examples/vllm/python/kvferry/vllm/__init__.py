"""kvferry as a KV connector of vLLM.

`--kv-transfer-config '{"kv_connector":"KvFerryConnector","kv_connector_module_path":"kvferry.vllm","kv_role":"kv_consumer"}'`
"""

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvferry.vllm.connector import KvFerryConnector

# `MultiConnector` looks connectors up by name for their metrics, even if a module path was given.
if "KvFerryConnector" not in KVConnectorFactory._registry:
    KVConnectorFactory.register_connector("KvFerryConnector", "kvferry.vllm", "KvFerryConnector")

__all__ = ["KvFerryConnector"]
