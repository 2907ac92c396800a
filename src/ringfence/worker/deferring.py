"""How a run begins where the one before it ended with a call that waits. PURE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ringfence.agent.pending import called
from ringfence.model import PendingCall, Prompt, RunRequest
from ringfence.policy.call_input import call_input
from ringfence.record.transcript import deferred

GO_ON = "Continue from where you left off."
_UNFINISHED = (
    "The tool call {} was allowed and had begun when this session was cut off. What it did is not "
    "known, and it was not run again."
)


def first_turns(request: RunRequest, home: Mapping[str, bytes]) -> tuple[Prompt | None, ...]:
    """The turns of a run in order; None is the one that `claude` begins by itself.

    It does so when the transcript ends with a deferred call, and waits for a prompt when it does
    not: an attempt that died after the call had run, or while it ran, leaves such a transcript to
    the next one, whose caller still has the answer.

    Args:
        request: with the caller's pending calls.
        home: files of the session, by path, as they are put before `claude`.
    """
    prompt: Prompt = request.content or request.prompt
    if request.resume is None:
        return (prompt,)
    stands_at = deferred(_main(home))
    prompts = (prompt,) if prompt else ()
    if stands_at is None:
        return prompts or (GO_ON,)
    if stands_at.begun:
        note = _UNFINISHED.format(stands_at.tool_use_id)
        if request.content:
            return (({"type": "text", "text": note}, *request.content),)
        return (f"{note}\n\n{request.prompt or GO_ON}",)
    return (None, *prompts)


def pending_tool_uses(
    pending: Iterable[PendingCall], home: Mapping[str, bytes]
) -> list[dict[str, Any]]:
    """The same calls for egress: what an earlier run's wire has shown (requirement B). One that has
    begun, or is over, is a part of the history like any other.
    """
    stands_at = deferred(_main(home))
    open_call = "" if stands_at is None or stands_at.begun else stands_at.tool_use_id
    told = [
        (call, called(call), call_input(called(call), call.input))
        for call in pending
        if call.tool_use_id == open_call
    ]
    return [
        {
            "tool_use_id": call.tool_use_id,
            "name": name,
            "input_sha256": form.digest,
            "input_place": form.place,
        }
        for call, name, form in told
    ]


def _main(home: Mapping[str, bytes]) -> list[bytes]:
    """Lines of the main conversation; a forked one has another name, and the same place."""
    names = [name for name in home if name.count("/") == 3 and name.endswith(".jsonl")]
    return home[names[0]].splitlines() if len(names) == 1 else []
