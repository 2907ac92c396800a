"""What a turn asks an attempt for. PURE."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from ringfence.control import media
from ringfence.control.run_plan import MULTI_AGENT, RunPlan
from ringfence.control.turns import Turn
from ringfence.errors import CallerError
from ringfence.model import Prompt, RunRequest, WorkspaceMode
from ringfence.record.transcript import Progress
from ringfence.worker.answering import answers_of, custom_tools_of, pending_of
from ringfence.worker.marks import Work
from ringfence.worker.seats import Company

GO_ON = (
    "The machine on which this was worked on stopped before it was done. What was done stands "
    "above; a tool call without a result may have had its effect or not: look before you repeat "
    "it. Go on from there."
)
"""What the agent is told when its turn goes on elsewhere."""
LOST_FILES = " Files are as they were before the user's last message: make lost changes again."
"""What it is told beside, where what it changed was kept nowhere, or on another host."""

_NAMES = uuid.UUID("3f0c55a2-4a0e-4f57-9d0f-2f1f0d0a6c11")


def prompt_id(turn: Turn) -> str:
    """The UUID of the turn's prompt in the transcript, the same for every attempt."""
    return str(uuid.uuid5(_NAMES, turn.run_id))


def prompt_of(turn: Turn) -> Prompt:
    """The messages of a turn, as one prompt: a text, or blocks where there is more than text."""
    blocks = [block for message in turn.messages for block in message.content]
    if next(iter(media.sourced(blocks)), None) is not None:
        return tuple(blocks)
    return _text_of(blocks)


def _text_of(blocks: Iterable[Mapping[str, Any]]) -> str:
    return "\n\n".join(str(block["text"]) for block in blocks if block.get("type") == "text")


def refuse_unsupported(turn: Turn) -> None:
    """What no worker of this version carries out. Raises CallerError `turn-unsupported`."""
    if [one for one in turn.resources if one.get("type") != "file"]:
        raise CallerError("turn-unsupported", "the session has resources that are no files")


def kept_here(plan: RunPlan, stands: Work | None) -> bool:
    """Whether what earlier attempts of the turn changed is in the directory of this host."""
    review = plan.policy.sandbox.workspace_mode is WorkspaceMode.REVIEW
    return stands is Work.KEEPING or (stands is not None and not review)


def may_end(plan: RunPlan, stands: Work | None) -> bool:
    """Whether a turn whose agent has said its last may end with that. What it changed in review
    mode is nowhere until it is kept: then it has to make the changes again.
    """
    review = plan.policy.sandbox.workspace_mode is WorkspaceMode.REVIEW
    return not review or stands is Work.KEEPING


def request_of(
    turn: Turn, plan: RunPlan, prompt: Prompt, said: Progress | None, *, here: bool = False
) -> RunRequest:
    """What `attempt` is asked for; the workspace is still to be named. `said`: how far the
    transcript has come; None when there is none. `here`: as `kept_here` says.

    Raises:
        CallerError: `turn-unsupported`.
    """
    begun = said in {Progress.BEGUN, Progress.DONE}
    again = GO_ON
    if not here:
        again += LOST_FILES
    text = prompt if isinstance(prompt, str) else _text_of(prompt)
    return RunRequest(
        prompt=again if begun else text,
        content=() if begun or isinstance(prompt, str) else prompt,
        prompt_id=None if begun else prompt_id(turn),
        workspace="",
        model=plan.model,
        effort=plan.effort,
        system_prompt=plan.system_prompt,
        max_budget_usd=turn.budget_left,
        resume=turn.transcript if said is not None else None,
        session_id=turn.transcript if said is None else None,
        defer=True,
        ask_tools=plan.policy.tools.asked,
        custom_tools=custom_tools_of(plan.custom_tools),
        approval_seconds=plan.approval_seconds,
        pending=pending_of(turn),
        answers=answers_of(turn),
    )


def company_of(turn: Turn, plan: RunPlan) -> Company | None:
    """None where a turn has a sandbox to itself."""
    if plan.hosting != MULTI_AGENT:
        return None
    return Company(
        tenant=turn.tenant,
        environment_id=turn.environment_id,
        environment=turn.environment,
        most=plan.max_agents,
        idle_seconds=plan.idle_seconds,
    )
