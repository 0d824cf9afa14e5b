"""Stages as forks of a process that has imported torch and the like: seconds less for each of hundreds of stages.

repro.py starts `python -m roads.runner.prefork` with one end of a socket pair and hands the other end down to the
processes that run stages; `run` sends an order through it, and a fork runs the stage's command. Nobody else can reach
the socket: it has no name. Our own modules are not imported before the fork: a stage runs the code that DVC has just
hashed. Linux only. Elsewhere, or where it is not there, a command runs as a new process, with the same result.
"""

import contextlib
import importlib
import json
import os
import re
import runpy
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING

from roads.process import end_with, end_with_parent
from roads.runner import stay

if TYPE_CHECKING:
    from roads import schema

ORDERS = "ROADS_PREFORK"  # in the environment: the number of the file descriptor that takes orders
STAY = "ROADS_STAY"  # in the environment: whoever runs an order stays for the next (stay.py)
PLAIN = re.compile(r"python -m [\w@%+=:,./ -]+", re.ASCII)  # a command that means the same without a shell
IMPORTS = ("torch", "accelerate", "safetensors.torch", "tokenizers", "tqdm", "pydantic.main", "pydantic.types",
           "ruamel.yaml", "scipy.stats", "matplotlib.pyplot", "rouge_score.rouge_scorer",
           "transformers.models.auto.modeling_auto", "transformers.models.gpt_neox.modeling_gpt_neox")


def imports() -> None:
    for module in IMPORTS:
        importlib.import_module(module)


def run(command: str, env: dict[str, str], cwd: str) -> int | None:
    """The exit code of `python -m MODULE ARG...`, run as a fork that writes where we do; -N where signal N killed it.

    None: nobody to do it, or a command for a shell. The fork ends when this process does, whatever ends it.
    """
    if ORDERS not in os.environ or not PLAIN.fullmatch(command):
        return None
    module, *args = command.split()[2:]
    env = {name: value for name, value in env.items() if name != ORDERS}
    order = json.dumps({"module": module, "args": args, "env": env, "cwd": str(cwd)}).encode()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs, socket.socket(fileno=os.dup(int(os.environ[ORDERS]))) as orders:
            try:
                socket.send_fds(orders, [order], [1, 2, theirs.fileno()])
            except OSError:  # it has died
                return None
        code = ours.recv(8)
    return int(code) if code else -signal.SIGKILL


def stays(compute: "schema.Compute") -> bool:
    """Whether a process stays for one stage after the other; vLLM has processes of its own, which end with a stage."""
    return compute.device == "gpu" and compute.sampler == "tree"


def serve(orders: socket.socket) -> None:
    """Fork a child for each order, until nobody is left to give one."""
    imports()  # orders that come meanwhile wait
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children: they say how they ended
    workers = stay.Workers(_perform, orders)
    while True:
        message, files, *_ = socket.recv_fds(orders, 1 << 20, 3, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return
        order = json.loads(message)
        if STAY in order["env"]:
            workers.order(message, files, order["env"].get("CUDA_VISIBLE_DEVICES"))
        elif os.fork() == 0:
            workers.forget()
            os._exit(_obey(order, *files))
        for file in files:
            os.close(file)


def _obey(order: dict, out: int, err: int, reply: int) -> int:
    """In the child: have a child of its own run what is ordered, and tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=reply) as connection:
        if (pid := os.fork()) == 0:
            os._exit(_run(order, out, err, connection))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # nothing of its group is left, or nobody listens any more
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            connection.send(str(code).encode())
    return 0


def _run(order: dict, out: int, err: int, connection: socket.socket) -> int:
    """In a process of its own, which ends with who ordered it."""
    os.setsid()
    end_with(connection)
    return _perform(order, out, err)


def _perform(order: dict, out: int, err: int) -> int:
    """Run the ordered module as `python -m` does; its exit code."""
    for here, there in ((1, out), (2, err)):
        os.dup2(there, here)
        os.close(there)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.argv = [order["module"], *order["args"]]
    code = 1
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code % 256


if __name__ == "__main__":
    end_with_parent(int(sys.argv[2]))
    serve(socket.socket(fileno=int(sys.argv[1])))
