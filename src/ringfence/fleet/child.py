"""`python -I -S child.py PARENT ARGV…`: become ARGV, and be told to end when PARENT is gone.

A program of its own, of the standard library: between fork and exec nothing of a process with
threads may be run, and what is set here outlasts an exec (prctl(2), PR_SET_PDEATHSIG).
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # the parent may have gone before that
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606
