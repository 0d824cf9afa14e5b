"""How a process ends with another: nothing is left running when what started it has gone."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when its parent, the one of that id, ends; it may be gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end_with(connection: socket.socket) -> None:
    """End this process, and its group, which it leads, when the other end of the connection is closed."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            connection.recv(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
