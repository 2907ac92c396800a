"""What egress tells of a run while it goes on: to the person, and to the run's outcome."""

from __future__ import annotations

from ringfence.agent.messages import Notice, RunPutOff
from ringfence.channel.messages import (
    AnyMessage,
    EgressDenied,
    ModelCalled,
    PutOff,
    WitnessViolated,
    witness_error,
)
from ringfence.worker.control import RunControl
from ringfence.worker.modelcalls import model_message
from ringfence.worker.outcome import Outcome, budget_spent, model_busy, model_unavailable
from ringfence.worker.station import OnMessage

_MENDS = {
    "model-not-at-provider": "name the model in the provider's `models` in the settings, or"
    " choose one that is there, with --model",
    **dict.fromkeys(
        ("credential-absent", "credential-denied", "credential-expired", "credential-unfit"),
        "`ringfence doctor` with this policy says why",
    ),
}
"""`claude` says of each 403 that it failed to authenticate."""


def noticed(
    message: AnyMessage, *, outcome: Outcome, control: RunControl, on_message: OnMessage
) -> None:
    """Pass one message on. A witness that was violated, and a request that was put off, end the
    run; what egress denied for want of something may explain its failure.
    """
    if isinstance(message, EgressDenied):
        mend = _MENDS.get(message.reason, "")
        text = f"egress refused {message.target}: {message.reason}" + (mend and f" ({mend})")
        on_message(Notice(kind="egress_denied", text=text))
        if message.reason.startswith("budget-exhausted"):
            outcome.hindrance = budget_spent(message.reason)
        elif message.reason == "model-unavailable":
            outcome.hindrance = model_unavailable()
    elif isinstance(message, ModelCalled):
        on_message(model_message(message))
    elif isinstance(message, PutOff):
        outcome.fail(model_busy(message.seconds, message.reason))
        on_message(RunPutOff(seconds=message.seconds, reason=message.reason))
        control.cancel()
    elif isinstance(message, WitnessViolated):
        outcome.fail(witness_error(message.reason))
        on_message(Notice(kind="witness_violated", text=message.reason))
        control.cancel()
