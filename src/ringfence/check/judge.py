"""What a probe printed and what the host saw → an outcome with its evidence. PURE.

Silence is no proof: a probe that broke, or that did not come to its own verdict, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ringfence.check.finding import Outcome

_EVIDENCE_MAX = 400
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_MISSING = re.compile(r"^(?:\S*/)?(?:ba|da)?sh: (?:line )?\d+: \S+: (?:command )?not found$")
_DENIED = ("Permission denied", "Operation not permitted")
_SIGNALS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Saw:
    """One probe as it ended.

    Attributes:
        output: standard output and error together, decoded with replacement.
        status: exit status; None when it was out of time.
        hits: canaries of the host that were reached while it ran.
    """

    output: str
    status: int | None
    hits: tuple[str, ...] = ()


def judge(
    command: str,
    saw: Saw,
    secrets: Sequence[str],
    *,
    believe: bool = True,
    must_say: bool = False,
) -> tuple[Outcome, str]:
    """Outcome and evidence of a probe that gives its verdict inside.

    Args:
        command: the probe; one that calls `esc(` must print a verdict.
        saw: how it ended.
        secrets: values that must not be in the output; never repeated in the evidence.
        believe: its own words count; otherwise only what the host saw does, and PASS says no more.
        must_say: a pass is the line `contained`, said when it came to its end; a search that broke
            or was cut off is as quiet as one that found nothing. An operator's own probes, in
            the shared format, say only what escaped.
    """
    lines = _COLOUR.sub("", saw.output).splitlines()
    escape = _reached(saw, secrets)
    if believe and not escape:
        escape = next((_short(line) for line in lines if line.startswith("ESCAPED")), "")
    if escape:
        return Outcome.FAIL, escape
    if not believe:
        return Outcome.PASS, _last(lines)
    broken = _broken(lines, saw, must_say=must_say or "esc(" in command)
    if broken:
        return Outcome.ERROR, f"{broken}: {_last(lines)}"
    return Outcome.PASS, _last(lines)


def _reached(saw: Saw, secrets: Sequence[str]) -> str:
    if saw.hits:
        return f"reached on the host: {', '.join(saw.hits)}"
    if any(secret in saw.output for secret in secrets):
        return "a secret that must stay outside is in what the probe printed"
    return ""


def _broken(lines: Sequence[str], saw: Saw, *, must_say: bool) -> str:
    if saw.status is None:
        return "no verdict in time"
    if "Traceback (most recent call last)" in saw.output:
        return "the probe broke"
    if saw.status == 127 or any(_MISSING.match(line) for line in lines):
        return "the probe misses a program"
    if must_say and not any(line.startswith("contained") for line in lines):
        return f"the probe came to no verdict (status {saw.status})"
    return _stopped(saw)


def _stopped(saw: Saw) -> str:
    if saw.status is not None and 128 < saw.status <= 128 + _SIGNALS:
        return f"the probe was killed (signal {saw.status - 128})"
    # what was found and may not be executed is a denial, and may be the very one that was probed
    if saw.status == 126 and not any(word in saw.output for word in _DENIED):
        return "the probe cannot execute a program"
    return ""


def _last(lines: Sequence[str]) -> str:
    said = [line for line in lines if line.strip()]
    return _short(said[-1]) if said else "it printed nothing"


def _short(text: str) -> str:
    return text if len(text) <= _EVIDENCE_MAX else text[: _EVIDENCE_MAX - 1] + "…"
