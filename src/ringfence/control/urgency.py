"""Whether somebody waits for a session's turns. PURE.

A session says so itself, in its `ringfence` block; else its environment does. Both are the caller's
word, and it cannot gain by it: who calls its work batch gets less, and what is interactive is what
everybody has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ringfence.queue.protocol import BATCH, NORMAL

Urgency = Literal["interactive", "batch"]


def priority_of(batch: bool | None, environment: Mapping[str, Any]) -> int:  # noqa: FBT001
    """That of a session's runs in the queue.

    batch: the session's word; None leaves it to its environment, whose body is `environment`.
    """
    if batch is None:
        batch = (environment.get("ringfence") or {}).get("priority") == "batch"
    return BATCH if batch else NORMAL
