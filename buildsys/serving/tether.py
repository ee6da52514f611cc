"""Runs a command whose whole process group ends with whoever started it: run by path, `python tether.py COMMAND…`, with a pipe as stdin.

The trick of buildsys/worker.py, for a program that is not ours: the far end of the pipe is held by the starter alone. When the starter
ends, however it ends, the kernel closes that end and sends the group a SIGKILL (fcntl(2), F_SETSIG). What is set here belongs to the open
pipe, so it outlives the exec. The caller makes the session and the group. Imports nothing of buildsys: another interpreter may run it.
"""

import fcntl
import os
import select
import signal
import sys

LIFELINE = 0
CANNOT_START = 127  # as a shell has it


def main(command: "list[str]") -> None:
    if sys.platform == "linux":  # LMDeploy's engines need CUDA, and so Linux
        fcntl.fcntl(LIFELINE, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(LIFELINE, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(LIFELINE, fcntl.F_SETFL, fcntl.fcntl(LIFELINE, fcntl.F_GETFL) | os.O_ASYNC)
    ready, _, _ = select.select([LIFELINE], [], [], 0)
    if ready:  # it carries no byte, so this is its end: the starter was gone before the kernel was told
        return
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.exit(CANNOT_START)


if __name__ == "__main__":
    main(sys.argv[1:])
