"""A stage that is a fork behaves as a new process does: output, exit code, environment, and how it ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENV, ROOT

from roads import config
from roads.runner import prefork

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prefork.py is for Linux")
CALL = "import os, sys; from roads.runner import prefork; code = prefork.run(sys.argv[1], os.environ, sys.argv[2])"
CALL += "; print('code', code)"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server, the socket that takes its orders and the environment of those who give them."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "run_job.py").write_text("import runpy\nrunpy.run_path('job.py', run_name='__main__')", encoding="utf-8")
    path = f"{ROOT / 'src'}:{folder}"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "roads.runner.prefork", str(theirs.fileno()), str(os.getpid())]
    env = ENV | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # as make has it
    process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])
    theirs.close()
    yield process, ours, ENV | {"PYTHONPATH": path, prefork.ORDERS: str(ours.fileno())}
    ours.close()
    assert process.wait(timeout=60) == 0  # nobody is left to give it an order


@pytest.fixture
def start(server, tmp_path):
    """Have a script, whose text is given, run as a fork; the process that ordered it, which prints its exit code."""

    def run(text: str, *args: str) -> subprocess.Popen:
        (tmp_path / "job.py").write_text(text, encoding="utf-8")
        command = " ".join(["python -m run_job", *args])
        _, orders, env = server
        return subprocess.Popen([sys.executable, "-c", CALL, command, tmp_path], env=env, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, pass_fds=[orders.fileno()])

    return run


def test_what_forks_has_one_thread(server, start):
    """A fork of several takes locks along that nobody will ever open; Python 3.12 warns of it."""
    assert said(start("print('here')")) == ("here\n", 0)
    status = Path(f"/proc/{server[0].pid}/status").read_text()
    assert "\nThreads:\t1\n" in status


def said(process: subprocess.Popen) -> tuple[str, int]:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    before, code = out.rsplit("code ", 1)
    return before, int(code)


def gone(pid: int, seconds: float = 5) -> bool:
    """Whether a process ends within the seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def pid_in(path: Path, process: subprocess.Popen) -> int:
    while not path.exists() or not path.read_text().endswith("\n"):
        assert process.poll() is None
        time.sleep(0.02)
    return int(path.read_text())


def test_what_it_says_and_its_exit_code(start):
    out, code = said(start("import os, sys, torch\n"
                           "print(sys.argv[1:], os.getcwd(), 'torch' in sys.modules, 'ROADS_PREFORK' in os.environ)\n"
                           "print('to the other', file=sys.stderr)\nsys.exit(3)", "--seed", "0"))
    assert code == 3 and "['--seed', '0']" in out and "True False\n" in out and "to the other\n" in out


def test_an_error_is_a_traceback_and_1(start):
    out, code = said(start("raise ValueError('no such thing')"))
    assert code == 1 and "ValueError: no such thing" in out


def test_processes_that_it_starts_are_waited_for(start):
    assert said(start("import subprocess\nassert subprocess.run(['false']).returncode == 1\nprint('waited')")) == (
        "waited\n", 0)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM"])
def test_a_fork_that_is_killed_tells_by_what(start, name):
    assert said(start(f"import os, signal\nos.kill(os.getpid(), signal.{name})"))[1] == -signal.Signals[name]


SLEEPS = """
import os, pathlib, subprocess, time
child = subprocess.Popen(["sleep", "600"])
pathlib.Path("child").write_text(f"{child.pid}\\n")
pathlib.Path("pid").write_text(f"{os.getpid()}\\n")
time.sleep(600)
"""


def test_the_fork_and_what_it_started_end_with_who_ordered_it(start, tmp_path):
    process = start(SLEEPS)
    pids = [pid_in(tmp_path / name, process) for name in ("pid", "child")]
    for pid in pids:
        os.kill(pid, 0)  # it is there
    process.kill()
    process.wait()
    assert all(gone(pid) for pid in pids)


def test_what_a_killed_fork_had_started_ends_with_it(start, tmp_path):
    process = start(SLEEPS)
    os.kill(pid_in(tmp_path / "pid", process), signal.SIGKILL)
    assert said(process)[1] == -signal.SIGKILL and gone(pid_in(tmp_path / "child", process))


@pytest.mark.parametrize("after", [0, 0.05, 0.3, 1, 2])
def test_a_server_ends_with_its_parent_in_its_imports_too(after):
    script = ("import socket, subprocess, sys, os, time\n"
              "ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
              "command = [sys.executable, '-m', 'roads.runner.prefork', str(theirs.fileno()), str(os.getpid())]\n"
              "print(subprocess.Popen(command, pass_fds=[theirs.fileno(), ours.fileno()]).pid, flush=True)\n"
              "time.sleep(600)")  # the server has both ends of the socket: that its parent has gone is all it sees
    parent = subprocess.Popen([sys.executable, "-c", script], env=ENV | {"PYTHONPATH": str(ROOT / "src")},
                              stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(after)
    parent.kill()
    parent.communicate()
    assert gone(pid)


ATTACK = """
import json, os, socket, sys
order = json.dumps({"module": "timeit", "args": ["-n1", "-r1", f"open({sys.argv[1]!r}, 'w')"], "env": {}, "cwd": "/"})
for line in open("/proc/net/unix"):
    if (name := line.split()[-1]).startswith("@"):
        for kind in socket.SOCK_SEQPACKET, socket.SOCK_STREAM:
            try:
                attack = socket.socket(socket.AF_UNIX, kind)
                attack.connect("\\0" + name[1:])
                socket.send_fds(attack, [order.encode()], [1, 2])
                attack.settimeout(5)
                attack.recv(1)
            except OSError:
                pass
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    except OSError as error:
        print(pid, error)
print("tried as", os.getuid())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_another_user_cannot_have_it_run_anything(server, start, tmp_path_factory):
    """It has no name to be found by, and Linux lets nobody else open another's sockets."""
    process, *_ = server
    assert said(start("print('ready')")) == ("ready\n", 0)
    assert "roads" not in Path("/proc/net/unix").read_text(encoding="utf-8")
    open_to_all = tmp_path_factory.getbasetemp().parent / "open"
    open_to_all.mkdir(mode=0o777, exist_ok=True)
    other = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/", "env": {}, "capture_output": True}
    if not (python := shutil.which("python3", path="/usr/bin:/usr/local/bin")):
        pytest.skip("no Python that another user can run")
    done = subprocess.run([python, "-c", ATTACK, str(open_to_all / "owned")], text=True, **other)
    assert "tried as 65534" in done.stdout and f"{process.pid} [Errno 13] Permission denied" in done.stdout
    assert not (open_to_all / "owned").exists()


@pytest.mark.parametrize("command", ["python -m run_job; touch owned", "python -m run_job $(touch owned)",
                                     "python -m run_job 'a b'", "python -m run_job > owned", "echo", "python run_job"])
def test_what_only_a_shell_understands_is_left_to_one(server, monkeypatch, command):
    monkeypatch.setenv(prefork.ORDERS, server[2][prefork.ORDERS])
    assert prefork.run(command, dict(os.environ), ".") is None


def test_without_a_server_there_is_none_to_do_it(monkeypatch):
    monkeypatch.delenv(prefork.ORDERS, raising=False)
    assert prefork.run("python -m roads.active check", dict(os.environ), ".") is None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()  # it has died
    with ours:
        monkeypatch.setenv(prefork.ORDERS, str(ours.fileno()))
        assert prefork.run("python -m roads.active check", dict(os.environ), ".") is None


@pytest.fixture
def order(server, tmp_path):
    """Have a script run as `start` does, by a process that stays."""
    (tmp_path / "job.py").write_text("", encoding="utf-8")

    def run(text: str, **env: str) -> subprocess.Popen:
        (tmp_path / "job.py").write_text(text, encoding="utf-8")
        _, orders, its = server
        return subprocess.Popen([sys.executable, "-c", CALL, "python -m run_job", tmp_path], stdout=subprocess.PIPE,
                                env=its | {prefork.STAY: "1"} | env, stderr=subprocess.STDOUT, text=True,
                                pass_fds=[orders.fileno()])

    return run


WHO = "import os, sys\nprint(os.getpid(), 'kept' in vars(sys))\nsys.kept = True\n"


def test_on_a_gpu_processes_stay():
    scales = config.load(ROOT / "params.yaml").scales
    assert [prefork.stays(scales[name].compute) for name in ("mini", "real", "real-tiny")] == [False, True, False]
    assert not prefork.stays(scales["real"].compute.model_copy(update={"sampler": "vllm"}))


def test_one_process_runs_order_after_order(order):
    first, second = (said(order(WHO, CUDA_VISIBLE_DEVICES="a"))[0].split() for _ in range(2))
    assert first[1] == "False" and second == [first[0], "True"]
    assert said(order(WHO, CUDA_VISIBLE_DEVICES="b"))[0].split()[1] == "False"  # another GPU's
    assert said(order(WHO, CUDA_VISIBLE_DEVICES="a"))[0].split() == second


def test_orders_at_the_same_time_are_run_by_several(order):
    wait = "import time\ntime.sleep(1)\n"
    both = [order(WHO + wait, CUDA_VISIBLE_DEVICES="c") for _ in range(2)]
    pids = {said(process)[0].split()[0] for process in both}
    assert len(pids) == 2
    assert said(order(WHO, CUDA_VISIBLE_DEVICES="c"))[0].split()[0] in pids


def test_an_order_that_fails_is_its_workers_last(order):
    first = said(order(WHO, CUDA_VISIBLE_DEVICES="d"))[0].split()
    out, code = said(order(WHO + "raise ValueError('no such thing')", CUDA_VISIBLE_DEVICES="d"))
    assert code == 1 and out.startswith(f"{first[0]} True\n") and "ValueError: no such thing" in out
    assert said(order(WHO, CUDA_VISIBLE_DEVICES="d"))[0].split()[1] == "False"
    assert gone(int(first[0]))


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_worker_that_is_killed_tells_by_what(order, name):
    text = f"import os, signal\nprint('here', flush=True)\nos.kill(os.getpid(), signal.{name})"
    assert said(order(text)) == ("here\n", -signal.Signals[name])
    assert said(order("print('again')")) == ("again\n", 0)


def test_a_worker_that_was_killed_with_nothing_to_do_is_replaced(order):
    first = said(order(WHO, CUDA_VISIBLE_DEVICES="g"))[0].split()
    time.sleep(0.5)
    os.kill(int(first[0]), signal.SIGKILL)
    assert gone(int(first[0]))
    time.sleep(0.5)
    out, code = said(order(WHO, CUDA_VISIBLE_DEVICES="g"))
    assert code == 0 and out.split()[1] == "False"


def test_a_worker_and_what_it_started_end_with_who_ordered_it(order, tmp_path):
    process = order(SLEEPS)
    pids = [pid_in(tmp_path / name, process) for name in ("pid", "child")]
    process.kill()
    process.wait()
    assert all(gone(pid) for pid in pids)


def test_a_child_that_outlives_its_order_holds_nothing_up(order):
    """As a compiler's helpers do: what they would print to is not the order's own output."""
    text = "import subprocess\nprint(subprocess.Popen(['sleep', '600']).pid, 'x' * 200_000)"
    started = time.monotonic()
    out, code = said(order(text, CUDA_VISIBLE_DEVICES="e"))
    assert code == 0 and len(out) > 200_000 and time.monotonic() - started < 30
    os.kill(child := int(out.split()[0]), 0)  # it is there, until its worker goes
    assert said(order("raise SystemExit(2)", CUDA_VISIBLE_DEVICES="e"))[1] == 2
    assert gone(child)


def test_a_worker_ends_when_code_has_changed(order, monkeypatch, tmp_path, server):
    source = ROOT / "src/roads/runner/stay.py"
    first = said(order(WHO, CUDA_VISIBLE_DEVICES="f"))[0].split()
    before = source.stat()
    try:
        os.utime(source, ns=(before.st_atime_ns, time.time_ns()))
        assert said(order(WHO, CUDA_VISIBLE_DEVICES="f"))[0].split()[1] == "False"
    finally:
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert gone(int(first[0]))


def test_workers_end_with_the_server(tmp_path):
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "run_job.py").write_text("import os\nprint(os.getpid())", encoding="utf-8")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = ENV | {"PYTHONPATH": f"{ROOT / 'src'}:{folder}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "roads.runner.prefork", str(theirs.fileno()), str(os.getpid())]
    process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])
    theirs.close()
    with ours:
        its = env | {prefork.ORDERS: str(ours.fileno()), prefork.STAY: "1"}
        done = subprocess.run([sys.executable, "-c", CALL, "python -m run_job", tmp_path], env=its, text=True,
                              capture_output=True, pass_fds=[ours.fileno()])
        pid = int(done.stdout.split()[0])
        os.kill(pid, 0)
        process.kill()
        process.wait()
    assert gone(pid)
