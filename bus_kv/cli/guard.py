"""Ends the processes of a cluster when the program that started them is gone, however it went.

Run as a program of its own. It reads `+PID` and `-PID` lines from stdin, which its owner holds
open; when the owner ends, even by SIGKILL, stdin ends, and what is still on the list is killed.
Standard library only, so it starts fast.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    pids: dict[int, None] = {}
    for line in sys.stdin:
        sign, pid = line[0], int(line[1:])
        if sign == "+":
            pids[pid] = None
        else:
            pids.pop(pid, None)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
