"""Giving back what the start of a sandbox had taken before it broke off."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from ringfence.sandbox import cgroups, hostfacts
from ringfence.sandbox.imageroot import HeldImage
from ringfence.sandbox.launcher import Launcher


async def undo(
    launcher: Launcher | None,
    handles: Sequence[int],
    groups: cgroups.Groups,
    lease: hostfacts.UidLease | None,
    image: HeldImage | None = None,
) -> None:
    """Give back what one had taken that came to nothing, at whichever step it broke off."""
    for handle in handles:
        os.close(handle)
    try:
        if launcher is not None:
            await asyncio.shield(launcher.end())
    finally:
        groups.remove()
        for one in (lease, image):
            if one is not None:
                one.release()
