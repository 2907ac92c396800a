"""Every route that asks for a key, with a good request of it: from the route table, so that a new
route is not forgotten.
"""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2

from ringfence.gateway.app import create_app
from ringfence.gateway.guard import OPEN
from ringfence.gateway.support import served

AGENT = {"name": "x", "model": "m", "metadata": {"secret": "of acme"}}


def filled(template: str, ids: dict[str, str]) -> str:
    return re.sub(r"\{([a-z_]+)\}", lambda match: ids[match[1]], template)


ROUTES = sorted(served(create_app(None, None)))
CLOSED = [(method, path) for method, path in ROUTES if path not in OPEN]
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/agents"): {"name": "x", "model": "m"},
    ("POST", "/v1/agents/{agent_id}"): {"name": "stolen"},
    ("POST", "/v1/environments"): {"name": "x"},
    ("POST", "/v1/environments/{environment_id}"): {"name": "stolen"},
    ("POST", "/v1/sessions"): {"agent": "{agent_id}", "environment_id": "{environment_id}"},
    ("POST", "/v1/sessions/{session_id}"): {"title": "stolen"},
    ("POST", "/v1/sessions/{session_id}/events"): {
        "events": [{"type": "user.message", "content": [{"type": "text", "text": "stolen"}]}]
    },
    ("POST", "/v1/sessions/{session_id}/resources"): {"type": "file", "file_id": "{file_id}"},
    ("POST", "/v1/sessions/{session_id}/resources/{resource_id}"): {"authorization_token": "x"},
    ("POST", "/v1/vaults"): {"display_name": "x"},
    ("POST", "/v1/vaults/{vault_id}"): {"display_name": "stolen"},
    ("POST", "/v1/vaults/{vault_id}/credentials"): {
        "auth": {
            "type": "static_bearer",
            "token": "0123456789",
            "mcp_server_url": "https://two.example.com/",
        }
    },
    ("POST", "/v1/vaults/{vault_id}/credentials/{credential_id}"): {"display_name": "stolen"},
}
MISSING = {
    "agent_id": "agent_no",
    "environment_id": "env_no",
    "session_id": "sesn_no",
    "resource_id": "sesrsc_no",
    "file_id": "file_no",
    "vault_id": "vlt_no",
    "credential_id": "vcrd_no",
}


def body_for(method: str, path: str, ids: dict[str, str]) -> Any:
    body = BODIES.get((method, path))
    return body and json.loads(filled(json.dumps(body), ids))


def names_one(method: str, path: str) -> bool:
    """Whether the path or the body names a thing of somebody's."""
    text = path + json.dumps(BODIES.get((method, path)))
    return any("{" + name + "}" in text for name in MISSING)


def sent(method: str, path: str, ids: dict[str, str]) -> dict[str, Any]:
    """What makes a request of a route a good one."""
    if (method, path) == ("POST", "/v1/files"):
        return {"files": {"file": ("x.txt", b"x")}}
    return {"json": body_for(method, path, ids)}


def possessions(client: httpx2.Client) -> dict[str, str]:
    """One thing of each kind, whose text says whose it is."""
    vault = client.post("/v1/vaults", json={"display_name": "of acme"}).json()["id"]
    auth = {
        "type": "static_bearer",
        "token": "0123456789",
        "mcp_server_url": "https://a.example.com/",
    }
    named = {"auth": auth, "display_name": "of acme"}
    agent = client.post("/v1/agents", json=AGENT).json()["id"]
    environment = client.post("/v1/environments", json={"name": "of acme"}).json()["id"]
    file = client.post("/v1/files", files={"file": ("of acme.txt", b"of acme")}).json()["id"]
    held = {"type": "file", "file_id": file, "mount_path": "/mnt/session/of acme"}
    started = {
        "agent": agent,
        "environment_id": environment,
        "title": "of acme",
        "resources": [held],
    }
    session = client.post("/v1/sessions", json=started).json()
    return {
        "agent_id": agent,
        "environment_id": environment,
        "session_id": session["id"],
        "resource_id": session["resources"][0]["id"],
        "file_id": file,
        "vault_id": vault,
        "credential_id": client.post(f"/v1/vaults/{vault}/credentials", json=named).json()["id"],
    }
