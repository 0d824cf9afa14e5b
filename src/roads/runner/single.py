"""One stage, as repro.py has it run: `dvc repro --single-item STAGE`, its commands as forks (prefork.py).

    python -m roads.runner.single STAGE [SOCKET]

A process of its own for each stage, hundreds of them: it imports nothing of ours that reads params.yaml, and hardly
more of DVC than it needs.
"""

import contextlib
import re
import signal
import socket
import sys

from roads.process import end_with
from roads.runner import dvc_patches, prefork

MODULE = "roads.runner.single"
IN_RWLOCK = "runner/single.py"  # how DVC's rwlock names such a process


def single_item(stage: str, runner: socket.socket | None) -> int:
    """Run a stage; the exit code. The runner, which is gone when its end of the socket is closed, is told why it
    failed."""
    if runner:
        end_with(runner)
    from dvc.stage.exceptions import StageCmdFailedError

    try:
        dvc_patches.reproduce(stage, prefork.run)
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        cause = error.__cause__ or error  # DVC's "failed to reproduce" comes first
        code = re.search(r"exited with (-?\d+)$", str(cause)) if isinstance(cause, StageCmdFailedError) else None
        reason = ended(int(code[1])) if code else dvc_patches.because(cause)
    if runner:
        runner.sendall(reason.encode())
    else:
        print(f"{stage}: {reason}", file=sys.stderr)
    return 1


def ended(code: int) -> str:
    """How a process ended that did not end well; a shell tells a signal as 128 more."""
    with contextlib.suppress(ValueError):
        sig = signal.Signals(-code if code < 0 else code - 128)
        return f"killed by signal {sig}{': out of memory?' if sig == signal.SIGKILL else f' ({sig.name})'}"
    return f"exit code {code}"


if __name__ == "__main__":
    name, *handed_down = sys.argv[1:]
    sys.exit(single_item(name, socket.socket(fileno=int(handed_down[0])) if handed_down else None))
