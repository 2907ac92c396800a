"""How a run ended, decided from what is known of it. Pure: one table of causes, worst first."""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.agent.command import CommandResult
from ringfence.agent.messages import TurnEnded
from ringfence.errors import AgentError, RingfenceError, UnavailableError
from ringfence.model import RunStatus
from ringfence.worker.control import Wish


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What is known, filled in while the run goes on.

    Attributes:
        failure: the first thing that went wrong; later ones are its effects.
        hindrance: what egress refused for want of budget, or of a provider that answers, or what
            the kernel killed for want of memory. It explains an agent that did not succeed, and
            takes nothing from one that did: any tool inside can ask for too much.
        expired: the wall clock ran out.
        wish: how strongly the end was asked for from outside.
        ended: how the agent's turn ended, in its own words.
        command: what a command left.
    """

    failure: RingfenceError | None = None
    hindrance: RingfenceError | None = None
    expired: bool = False
    wish: Wish = Wish.GO_ON
    ended: TurnEnded | None = None
    command: CommandResult | None = None

    def fail(self, error: RingfenceError) -> None:
        """Keep the first failure."""
        self.failure = self.failure or error

    def hinder(self, error: RingfenceError) -> None:
        """Keep the first hindrance."""
        self.hindrance = self.hindrance or error

    @property
    def _failed(self) -> RingfenceError | None:
        """The first failure. A program that was killed while it started, because somebody ended the
        run just then, is none of the host's.
        """
        failure = self.failure
        if failure is None or self.wish is Wish.GO_ON or failure.code != "sandbox-start-failed":
            return failure
        return None

    @property
    def status(self) -> RunStatus:
        """The terminal state."""
        if self.expired:
            return RunStatus.EXPIRED
        if self._failed is not None:
            return RunStatus.FAILED
        if self.wish is not Wish.GO_ON:
            return RunStatus.CANCELLED
        if self.command is not None:
            return RunStatus.SUCCEEDED if self.command.exit_code == 0 else RunStatus.FAILED
        return RunStatus.SUCCEEDED if self.ended and self.ended.ok else RunStatus.FAILED

    @property
    def error(self) -> RingfenceError | None:
        """What to tell the caller; None after success."""
        if self._failed is not None:
            return self._failed
        if self.status is RunStatus.FAILED and self.hindrance is not None:
            return self.hindrance
        if self.status is RunStatus.FAILED:
            if self.command is not None:
                code = self.command.exit_code
                return AgentError("agent-failed", f"the program ended with exit status {code}")
            why = self.ended.reason if self.ended else "no answer"
            return AgentError("agent-failed", f"the agent did not succeed: {why}")
        if self.status is RunStatus.CANCELLED:
            return AgentError("run-interrupted", "the run was ended from outside")
        return None

    @property
    def exit_code(self) -> int:
        """A command's own status when nothing else ended it; otherwise the error's family."""
        error = self.error
        if self.command is not None and (error is None or error.code in _OF_THE_PROGRAM):
            return self.command.exit_code
        return error.status if error is not None else 0

    @property
    def text(self) -> str:
        """The agent's last answer, or a command's standard output."""
        if self.command is not None:
            return self.command.output.decode("utf-8", "replace")
        return self.ended.text if self.ended else ""

    @property
    def stderr(self) -> str:
        """A command's standard error."""
        return self.command.errors.decode("utf-8", "replace") if self.command else ""


_OF_THE_PROGRAM = frozenset({"agent-failed", "memory-exhausted"})
"""What a program's own exit status tells, too."""


def memory_spent(kills: int, limit_mb: int) -> AgentError:
    """The kernel killed so many processes of the sandbox at its limit."""
    what = "a process inside was" if kills == 1 else f"{kills} processes inside were"
    return AgentError(
        "memory-exhausted",
        f"{what} killed at the sandbox's memory limit of {limit_mb} MB",
        hint="raise execution.max_memory_mb in the policy",
    )


def budget_spent(reason: str) -> AgentError:
    """Egress refused a request for its price."""
    return AgentError(
        "budget-exhausted",
        f"the run's budget is spent ({reason})",
        hint="raise model.max_budget_usd in the policy, or --max-budget-usd",
    )


def model_unavailable() -> UnavailableError:
    """Egress tried all that the policy allows."""
    return UnavailableError(
        "model-unavailable",
        "no provider that the policy allows answers: a model request was given up",
        hint="see `ringfence limits status`; the policy's model.failover names others, and "
        "model.exhausted: queue puts runs off",
    )


def model_busy(seconds: float, reason: str) -> UnavailableError:
    """The fleet's limits would keep a request longer than its client waits."""
    return UnavailableError(
        "model-busy",
        f"the model is busy: {reason}; its turn would come in {seconds:.0f} seconds",
        hint="a worker's queue tries again by itself; see `ringfence limits status`",
    )
