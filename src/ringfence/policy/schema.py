"""JSON Schema of the policy document, for editors and other programs. PURE.

It describes shape and ranges; what the names may say (hosts, paths, tools) is checked by loading.
"""

from __future__ import annotations

from typing import Any

from ringfence.policy.document import PolicyDocument


def policy_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a policy as it is written, presets not yet merged."""
    schema = PolicyDocument.model_json_schema(mode="validation")
    definitions = schema["$defs"]
    definitions["HostGrant"] = _or_text(
        definitions["HostGrant"], "host or host:port, such as api.example.com"
    )
    definitions["PathGrant"] = _or_text(definitions["PathGrant"], "METHOD and path, as GET /v1/**")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "ringfence policy",
    }


def _or_text(definition: dict[str, Any], description: str) -> dict[str, Any]:
    return {"anyOf": [{"type": "string", "description": description}, definition]}
