"""A caller's `on_message` may raise, and the run's work is not its to lose."""

from __future__ import annotations

from typing import Self

from ringfence.agent.messages import AgentMessage
from ringfence.worker.control import RunControl
from ringfence.worker.ends import broken_off, cut_off
from ringfence.worker.outcome import Outcome
from ringfence.worker.station import OnMessage


class Careful:
    """Calls it until it raises. Then the run is cancelled and has failed, and it is called no more;
    what it raised waits until the sandbox is stopped and its changes are taken: for the end of the
    block that this is the context of.

    It is called where a notice of egress ends a run, and where a sandbox is stopped: an exception
    would pass over the rest of either.
    """

    def __init__(self, on_message: OnMessage, control: RunControl, outcome: Outcome) -> None:
        self._on_message, self._control, self._outcome = on_message, control, outcome
        self._error: BaseException | None = None

    def __call__(self, message: AgentMessage) -> None:
        """Pass a message on."""
        if self._error is not None:
            return
        try:
            self._on_message(message)
        except BaseException as error:  # noqa: BLE001  whatever it is, it is raised again
            self._error = error
            cut_off(error, self._outcome, self._control)
            self._control.cancel()

    def __enter__(self) -> Self:
        """Around the whole run, its end and all."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Raise what it raised, and what broke the run off after that stands behind it. But a
        cancellation must be seen by who cancelled: then it is the cause. A fault of the system is
        `host-failed`, whoever met it.
        """
        theirs = self._error
        if theirs is not None and (error is None or isinstance(error, Exception)):
            if isinstance(theirs, OSError):
                raise broken_off(theirs) from theirs
            raise theirs
        if isinstance(error, OSError):
            raise broken_off(error) from error
        if error is not None and theirs is not None:
            error.__cause__ = theirs
