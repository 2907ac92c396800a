"""Idempotency-Key: a request that is sent twice has one effect and one answer.

draft-ietf-httpapi-idempotency-key-header-07. The key, the effect and the answer are written in
one transaction, so that there is no moment in which only some of them are. A request that fails
leaves no record: the next one is judged anew. Records are kept for a day.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from ringfence.control.tenancy import Caller
from ringfence.errors import CallerError
from ringfence.store import idempotency
from ringfence.store.database import now

KEEP = 86_400_000_000
"""Microseconds."""


async def once(
    connection: AsyncConnection,
    caller: Caller,
    key: str | None,
    request: bytes,
    act: Callable[[], Awaitable[dict[str, Any]]],
) -> tuple[dict[str, Any], bool]:
    """The answer of `act`, and whether it is that of an earlier request.

    `request` is all that makes a request what it is: method, target and body.

    Raises:
        CallerError: `idempotency-mismatch`; `request-invalid` for a key that is none; what `act`
            raises.
    """
    if key is None:
        return await act(), False
    if not re.fullmatch(r"[\x21-\x7e]{1,255}", key):
        raise CallerError(
            "request-invalid", "Idempotency-Key: write 1 to 255 printable ASCII characters"
        )
    fingerprint = hashlib.sha256(request).hexdigest()
    earlier = await idempotency.claim(
        connection, caller.tenant, key, fingerprint=fingerprint, moment=now(), keep=KEEP
    )
    if earlier is None:
        answer = await act()
        await idempotency.settle(connection, caller.tenant, key, answer)
        return answer, False
    if earlier.fingerprint != fingerprint:
        raise CallerError(
            "idempotency-mismatch",
            "Idempotency-Key: it was used for another request",
            hint="take a new key for a new request",
        )
    return dict(earlier.answer), True
