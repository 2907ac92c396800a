"""What a policy means, for a person who has to answer for it. PURE."""

from __future__ import annotations

from typing import Any

from ringfence.policy.compile import compile_policy, role_of, withheld
from ringfence.policy.diff import failover_words
from ringfence.policy.document import PolicyDocument
from ringfence.policy.rights import denials, limits, printable, rights

_HEADINGS = {
    "model": "The model route permits",
    "host": "Tools reach",
    "tool": "Tools",
    "mode": "Permission modes",
    "workspace": "The workspace",
    "system": "The system",
    "file": "Files, beside the system's",
    "isolation": "Isolation",
    "control": "WITHOUT ENFORCEMENT, accepted by this policy",
}
_NOTHING = {
    "model": "nothing: the model cannot be asked",
    "host": "no host",
    "tool": "none is offered",
    "file": "none of the host's",
}


def explain(document: PolicyDocument) -> dict[str, Any]:
    """The meaning as JSON: `digest`, `role`, `permits` by area, `denies`, `withheld`, `limits`.

    An opaque tunnel is labelled in `permits.host` as the exfiltration grant it is.
    """
    policy = compile_policy(document)
    name, role = role_of(document)
    permits: dict[str, list[str]] = {area: [] for area in _HEADINGS}
    for right in rights(policy):
        permits[right.area].append(right.text)
    return {
        "digest": policy.digest,
        "role": name,
        "isolation": policy.sandbox.isolation,
        "threat_model": policy.sandbox.threat_model,
        "permits": permits,
        "denies": [denial.text for denial in denials(policy)],
        "withheld": {tool: ceiling for tool in role.allow if (ceiling := withheld(document, tool))},
        "failover": failover_words(document),
        "limits": limits(policy),
    }


def explain_text(document: PolicyDocument) -> str:
    """The same as lines for a terminal."""
    meaning = explain(document)
    lines = [f"policy {meaning['digest'][:16]}, role {meaning['role']}, {meaning['isolation']}"]
    for area, heading in _HEADINGS.items():
        texts = meaning["permits"][area] or ([_NOTHING[area]] if area in _NOTHING else [])
        if texts:
            lines += ["", f"{heading}:", *(f"  {text}" for text in texts)]
    if meaning["withheld"]:
        lines += ["", "Granted, and taken away by a ceiling:"]
        lines += [f"  {tool} ({ceiling}: false)" for tool, ceiling in meaning["withheld"].items()]
    lines += ["", "Denied whatever else says:", *(f"  {text}" for text in meaning["denies"])]
    lines += ["", f"When the model's provider does not answer: {meaning['failover']}"]
    lines += ["", "Limits:"]
    lines += [
        f"  {key}: {'unlimited' if value is None else f'{value:g}'}"
        for key, value in meaning["limits"].items()
    ]
    return "\n".join(printable(line) for line in lines) + "\n"
