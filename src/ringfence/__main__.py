"""The `ringfence` command, and `python -m ringfence`."""

from __future__ import annotations

import signal


def main() -> None:
    """Entry of the command. Until the program is loaded, which takes a second on a busy host, a
    Ctrl-C ends the process as the system does, and not with the traceback of an import.
    """
    # ignored, as under nohup, it stays so
    asks = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if asks:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ringfence import wiring
    from ringfence.cli import main as _  # noqa: F401  the slow half

    if asks:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    wiring.main()


if __name__ == "__main__":
    main()
