"""A stage that is a fork behaves as a new process does: output, exit code, environment, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENV, ROOT

from roads import prefork

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prefork.py is for Linux")
CALL = "import os, sys; from roads import prefork; code = prefork.run(sys.argv[1], os.environ, sys.argv[2])"
CALL += "; sys.exit(99 if code is None else code)"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path")
    (folder / "run_job.py").write_text("import runpy\nrunpy.run_path('job.py', run_name='__main__')", encoding="utf-8")
    name, path = f"roads-test-{os.getpid()}", f"{ROOT / 'src'}:{folder}"
    process = subprocess.Popen([sys.executable, "-m", "roads.prefork", name], env=ENV | {"PYTHONPATH": path})
    while f"@{name}" not in Path("/proc/net/unix").read_text(encoding="utf-8"):  # it does not listen yet
        assert process.poll() is None
        time.sleep(0.02)
    yield {**ENV, "PYTHONPATH": path, prefork.NAME: name}
    process.kill()
    process.wait()


@pytest.fixture
def start(server, tmp_path):
    """Have a script, whose text is given, run as a fork; the process that ordered it."""

    def run(text: str, *args: str) -> subprocess.Popen:
        (tmp_path / "job.py").write_text(text, encoding="utf-8")
        command = " ".join(["python -m run_job", *args])
        return subprocess.Popen([sys.executable, "-c", CALL, command, tmp_path], env=server, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    return run


def test_what_it_says_and_its_exit_code(start):
    process = start("import os, sys, torch\nprint(sys.argv[1:], os.getcwd(), 'torch' in sys.modules, flush=True)\n"
                    "print('to the other', file=sys.stderr)\nsys.exit(3)", "--seed", "0")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and "['--seed', '0']" in out and "True\n" in out and "to the other\n" in out


def test_an_error_is_a_traceback_and_1(start):
    process = start("raise ValueError('no such thing')")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "ValueError: no such thing" in out


def test_processes_that_it_starts_are_waited_for(start):
    process = start("import subprocess\nassert subprocess.run(['false']).returncode == 1\nprint('waited')")
    assert process.communicate(timeout=60)[0] == "waited\n" and process.returncode == 0


def test_a_killed_fork_is_a_failure(start):
    process = start("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL


def test_the_fork_ends_with_who_ordered_it(start, tmp_path):
    process = start("import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)")
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)  # it is there
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail("it still runs")


def test_without_a_server_there_is_none_to_do_it(monkeypatch):
    monkeypatch.setenv(prefork.NAME, "roads-nobody")
    assert prefork.run("python -m roads.config check", dict(os.environ), ".") is None
    monkeypatch.delenv(prefork.NAME)
    assert prefork.run("python -m roads.config check", dict(os.environ), ".") is None
