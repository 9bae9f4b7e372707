"""The comparison when a system cannot start: `python3 -m unittest discover -s benches/peers`. Needs only the standard library."""
import contextlib
import importlib.machinery
import importlib.util
import io
import pathlib
import sys
import tempfile
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
loader = importlib.machinery.SourceFileLoader("peers_run", str(HERE / "run"))
run = importlib.util.module_from_spec(importlib.util.spec_from_loader("peers_run", loader))
loader.exec_module(run)

READER = """
import json, os, sys
sys.path.insert(0, {here!r})
from server import Server

def serve(total):
    {serve}

if __name__ == "__main__":
    server = Server(serve, 1)
    server.ready()
    {read}
    print(json.dumps({{"block_size": 4096, "gb_per_s": 1.5}}))
    server.stop()
"""
# The process that serves is dead long before this ends.
WAIT = "import time; time.sleep(600)"


class Run(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        for name in ("install", "SYSTEMS"):
            self.addCleanup(setattr, run, name, getattr(run, name))
        run.install = lambda name: sys.executable

    def table(self, *arguments, **systems):
        run.SYSTEMS = systems
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(run.main(["--sizes", "4096,16384", *arguments]), 0)
        return out.getvalue()

    def reader(self, serve, read="pass"):
        file = self.folder / f"reader{len(list(self.folder.iterdir()))}.py"
        file.write_text(READER.format(here=str(HERE), serve=serve, read=read))
        return run.script("peer", str(file))

    def test_a_process_that_dies_ends_the_run_with_its_reason(self):
        began = time.monotonic()
        table = self.table(
            works=self.reader("return 1, None"),
            cannot_import=self.reader("raise ImportError('libibverbs.so.1: cannot open shared object file')"),
            crashes=self.reader("os.abort()"),
            dies_later=self.reader("import threading; threading.Timer(0.2, os._exit, [3]).start(); return 1, None", WAIT),
        )
        self.assertIn("| works | 1.50 | - |", table)
        self.assertIn("| cannot_import | ImportError: libibverbs.so.1: cannot open shared object file |  |", table)
        self.assertIn("| crashes | the process that serves the blocks ended with code -6 |  |", table)
        self.assertIn("| dies_later | the process that serves the blocks ended with code 3 |  |", table)
        # One of them alone would wait for ten minutes.
        self.assertLess(time.monotonic() - began, 120)

    def test_a_system_that_did_not_start_is_not_started_again(self):
        calls = []

        def broken(total_mib, sizes):
            calls.append(total_mib)
            raise run.CannotRun("no such library")

        self.assertIn("| broken | no such library |  |", self.table("--rounds", "3", broken=broken))
        self.assertEqual(len(calls), 1)

    def test_a_missing_program_and_library_are_named(self):
        with self.assertRaisesRegex(run.CannotRun, "no-such-program is missing"):
            run.checked(["no-such-program"])
        named = []
        need, run.need = run.need, named.append
        self.addCleanup(setattr, run, "need", need)
        run.need_libraries({"libc.so.6": "libc6", "libnone.so.1": "libnone1"})
        self.assertEqual(named, ["libnone1"])

    def test_only_chooses_by_parts_of_names(self):
        systems = {name: lambda total_mib, sizes: {4096: 1.0} for name in ("kvferry tcp", "NIXL, UCX tcp", "Mooncake tcp")}
        chosen = self.table("--only", "nixl,moon", **systems)
        self.assertEqual([name in chosen for name in systems], [False, True, True])

    def test_a_figure_is_drawn_only_on_request(self):
        tracked = (HERE / "peers.svg").read_bytes()
        works = self.reader("return 1, None")
        self.table(works=works)
        self.assertEqual((HERE / "peers.svg").read_bytes(), tracked)
        self.table("--svg", str(self.folder / "out.svg"), works=works)
        self.assertIn("works", (self.folder / "out.svg").read_text())


if __name__ == "__main__":
    unittest.main()
