"""Processes that stay for one stage after the other: on a GPU what a process compiles and sets up first takes longer
than many a small stage.

A worker runs what is ordered, one order at a time. Its keeper, the process that has started it, hands orders on to it,
copies what it prints to who ordered it, and tells how each ended; that printing goes through the keeper because a
worker's own children, compilers say, may outlive a stage and would hold its output open. A worker ends with its keeper,
with who ordered what it is at, with a stage that failed, and where code has changed since it began.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from roads.process import end_with_parent

Perform = Callable[[dict, int, int], int]  # order, where its output and its errors go -> exit code
CODE = Path(__file__).parents[1]


def code() -> int:
    """When our code was last changed; a worker keeps the modules that it has imported."""
    return max(file.stat().st_mtime_ns for file in [CODE, *CODE.rglob("*.py")])


class Workers:
    """The server's side: the keepers that there are, and which of them have nothing to do."""

    def __init__(self, perform: Perform, inherited: socket.socket):
        self.perform, self.inherited = perform, inherited
        self.idle: list[tuple[socket.socket, object]] = []
        self.at_work: list[tuple[socket.socket, object]] = []

    def order(self, message: bytes, files: list[int], gpu: str | None) -> None:
        """Have a worker of today's code and of this GPU run an order, a new one where none is idle."""
        kind = code(), gpu
        self._look()
        for keeper, _ in [it for it in self.idle if it[1][0] != kind[0]]:
            keeper.close()
        self.idle = [it for it in self.idle if it[1][0] == kind[0]]
        found = next((it for it in self.idle if it[1] == kind), None)
        if found:
            self.idle.remove(found)
        else:
            found = self._start(files), kind
        self.at_work.append(found)
        with contextlib.suppress(OSError):  # it has just died: who ordered sees the connection closed
            socket.send_fds(found[0], [message], files)

    def _look(self) -> None:
        """Which of those at work are done, and which are gone."""
        entries = {it[0]: it for it in self.idle + self.at_work}
        while readable := select.select(list(entries), [], [], 0)[0]:
            for keeper in readable:  # one that was done may be gone since: both are read
                entry, said = entries[keeper], b""
                (self.idle if entry in self.idle else self.at_work).remove(entry)
                with contextlib.suppress(OSError):
                    said = keeper.recv(1)
                if said:
                    self.idle.append(entry)
                else:
                    del entries[keeper]
                    keeper.close()

    def _start(self, files: list[int]) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            # What is held open here is not seen to close: the server's sockets, and where the order's output goes.
            ours.close()
            self.forget()
            for file in files:
                os.close(file)
            os._exit(_keep(theirs, self.perform))
        theirs.close()
        return ours

    def forget(self) -> None:
        """In a child: close what only the server may hold."""
        for it in (self.inherited, *(keeper for keeper, _ in self.idle + self.at_work)):
            it.close()


def _keep(orders: socket.socket, perform: Perform) -> int:
    """In a keeper: start a worker, and have it do what is ordered."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pipes = [os.pipe() for _ in (1, 2)]
    keeper = os.getpid()
    if (pid := os.fork()) == 0:
        for it in (ours, orders):
            it.close()
        for pipe, _ in pipes:
            os.close(pipe)
        os._exit(_work(theirs, [out for _, out in pipes], keeper, perform))
    theirs.close()
    for _, out in pipes:
        os.close(out)
    said = [pipe for pipe, _ in pipes]
    code = b"0"
    while code == b"0":
        message = b""
        if ours in select.select([orders, ours], [], [])[0]:
            break  # the worker has died, with nothing to do
        with contextlib.suppress(OSError):  # the server has gone, and had not heard all
            message, files, *_ = socket.recv_fds(orders, 1 << 20, 3, socket.MSG_CMSG_CLOEXEC)
        if not message:
            break
        *to, reply = files
        with socket.socket(fileno=reply) as connection:
            code = _follow(message, ours, dict(zip(said, to)), connection, orders)
            if code != b"0":
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
            if not code:
                code = str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode()
            for file in to:
                os.close(file)
            with contextlib.suppress(OSError):  # nobody listens any more
                connection.send(code)
        with contextlib.suppress(OSError):
            if code == b"0":
                orders.send(b".")
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    return 0


def _follow(message: bytes, worker: socket.socket, copied: dict[int, int], connection: socket.socket,
            orders: socket.socket) -> bytes:
    """Give the worker an order and copy what it prints until it is done. Returns its exit code, or b"" where it has
    died or must be killed: nobody waits for the order any more, or the server has gone."""
    with contextlib.suppress(OSError):
        worker.send(message)
    code, over = b"", False
    while not over:
        ready = select.select([worker, connection, orders, *copied], [], [])[0]
        if over := any(it in ready for it in (worker, connection, orders)):
            with contextlib.suppress(OSError):
                code = worker.recv(8) if worker in ready else b""
        while some := [it for it in select.select(list(copied), [], [], 0)[0] if it in copied]:
            for pipe in some:
                data = os.read(pipe, 1 << 16)
                with contextlib.suppress(OSError):  # nobody reads it any more
                    os.write(copied[pipe], data)
                if not data:
                    del copied[pipe]
    return code


def _work(orders: socket.socket, out: list[int], keeper: int, perform: Perform) -> int:
    """In a worker: do what is ordered."""
    os.setsid()
    end_with_parent(keeper)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # of a module that was imported before
    while message := orders.recv(1 << 20):
        code = perform(json.loads(message), *map(os.dup, out))
        _give_back()
        orders.send(str(code).encode())
        if code:
            return code
    return 0


def _give_back() -> None:
    """Leave the GPU's memory to others."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
