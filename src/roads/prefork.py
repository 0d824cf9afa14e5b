"""Stages as forks of a process that has imported torch and the like: seconds less for each of hundreds of stages.

repro.py starts `python -m roads.prefork NAME` and names it in the environment; `run` then has it fork a child that runs
a stage's command. Our own modules are not imported before the fork: a stage runs the code that DVC has just hashed.
Linux only. Elsewhere, or where it is not there, a command runs as a new Python, with the same result.
"""

import importlib
import json
import os
import runpy
import shlex
import signal
import socket
import sys
import threading
import traceback

NAME = "ROADS_PREFORK"  # the environment variable
IMPORTS = ("torch", "accelerate", "safetensors.torch", "tokenizers", "tqdm", "pydantic", "ruamel.yaml", "scipy.stats",
           "matplotlib.pyplot", "transformers.models.auto.modeling_auto",
           "transformers.models.gpt_neox.modeling_gpt_neox")


def run(command: str, env: dict[str, str], cwd: str) -> int | None:
    """The exit code of `python -m MODULE ARG...`, run as a fork that writes where we do; None: there is none to do it.

    The fork ends when this process does, whatever ends it.
    """
    words = shlex.split(command)
    if NAME not in os.environ or words[:2] != ["python", "-m"]:
        return None
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(f"\0{os.environ[NAME]}")
    except OSError:
        return None
    with connection:
        order = json.dumps({"module": words[2], "args": words[3:], "env": dict(env), "cwd": str(cwd)})
        socket.send_fds(connection, [order.encode()], [1, 2])
        code = connection.recv(1)
    return code[0] if code else 128 + signal.SIGKILL


def serve(name: str) -> None:
    """Fork a child for each order, until our parent is gone."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(f"\0{name}")
    server.listen()  # orders may come from now on, and wait
    for module in IMPORTS:
        importlib.import_module(module)
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children: they say how they ended
    server.settimeout(1)
    while os.getppid() == parent:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            server.close()
            os._exit(_obey(connection))
        connection.close()


def _obey(connection: socket.socket) -> int:
    """In the child: run what is ordered, and tell its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    message, files, *_ = socket.recv_fds(connection, 1 << 20, 2)
    order = json.loads(message)
    for here, there in zip((1, 2), files):
        os.dup2(there, here)
        os.close(there)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    threading.Thread(target=_end_with, args=[connection], daemon=True).start()
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
    connection.send(bytes([code % 256]))
    return code % 256


def _end_with(connection: socket.socket) -> None:
    """Who ordered the run says nothing more: a word, or its end, is the end."""
    connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1])
