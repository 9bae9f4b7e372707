"""Other versions of vLLM: the connector can be imported, has all methods, and accepts their arguments."""

import os
import subprocess
import sys

import pytest
import versions

# Runs with that version's Python files first in the path. Its native parts are missing; this check does not need them.
CHECK = """
import inspect, vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1 as Base
from kvferry.vllm import KvFerryConnector as Ours
assert not Ours.__abstractmethods__, Ours.__abstractmethods__
def names(f):
    return [p.name for p in inspect.signature(f).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
checked = 0
for name, theirs in inspect.getmembers(Base, callable):
    ours = getattr(Ours, name)
    if ours is theirs or name not in vars(Ours):
        continue
    assert names(ours)[: len(names(theirs))] == names(theirs), (name, names(ours), names(theirs))
    checked += 1
assert checked > 10, checked
print(vllm.__file__)
"""


@pytest.mark.parametrize("version", versions.PACKAGES)
def test_the_connector_fits_the_interfaces_of_other_versions(version: str) -> None:
    files = versions.files(version)
    path = os.pathsep.join([str(files), os.environ["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-c", CHECK], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().startswith(str(files))
