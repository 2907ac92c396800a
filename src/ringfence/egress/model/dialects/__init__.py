"""The forms of the Messages API that providers speak. PURE.

Inside there is one dialect: a request was admitted in it, and its answer is judged, metered and
passed in it. What a provider speaks exists between this package and the wire alone.
"""

from ringfence.egress.model.dialects.answers import (
    Answering,
    DialectError,
    Direct,
    FromBedrock,
    FromVertex,
)
from ringfence.egress.model.dialects.requests import (
    Asked,
    Call,
    Form,
    Unserved,
    anthropic,
    bedrock,
    made,
    vertex,
)

__all__ = [
    "Answering",
    "Asked",
    "Call",
    "DialectError",
    "Direct",
    "Form",
    "FromBedrock",
    "FromVertex",
    "Unserved",
    "anthropic",
    "bedrock",
    "made",
    "vertex",
]
