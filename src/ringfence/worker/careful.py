"""A caller's `on_message` may raise, and the run's work is not its to lose."""

from __future__ import annotations

from ringfence.agent.messages import AgentMessage
from ringfence.worker.control import RunControl
from ringfence.worker.ends import broken_off
from ringfence.worker.outcome import Outcome
from ringfence.worker.station import OnMessage


class Careful:
    """Calls it until it raises. Then the run is cancelled and has failed, and it is called no more;
    what it raised waits until the sandbox is stopped and its changes are taken.

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
            self._outcome.fail(broken_off(error))
            self._control.cancel()

    def raise_again(self) -> None:
        """What it raised, if it did; a fault of the system as `host-failed`."""
        if isinstance(self._error, OSError):
            raise broken_off(self._error) from self._error
        if self._error is not None:
            raise self._error
