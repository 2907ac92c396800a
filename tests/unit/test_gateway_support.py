"""The table of public routes is what the official client calls."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from ringfence.gateway.app import create_app
from ringfence.gateway.support import public_routes, refusal, served

_CALL = re.compile(
    r"self\._(post|get|put|patch|delete|get_api_list)\(\s*(?:path_template\(\s*)?f?\"(/v1/[^\"?]*)"
)


def _of_the_client() -> set[tuple[str, str]]:
    spec = importlib.util.find_spec("anthropic")
    assert spec
    assert spec.origin
    found = set()
    for path in (Path(spec.origin).parent / "resources").rglob("*.py"):
        for verb, route in _CALL.findall(path.read_text()):
            found.add(("GET" if verb == "get_api_list" else verb.upper(), route))
    return found


def test_the_table_is_what_the_installed_client_calls() -> None:
    administration = ("/v1/organizations", "/v1/compliance")
    client = {pair for pair in _of_the_client() if not pair[1].startswith(administration)}
    assert len(client) > 100
    assert set(public_routes()) == client


def test_whatever_is_served_below_v1_is_public() -> None:
    ours = {pair for pair in served(create_app(None, None)) if pair[1].startswith("/v1/")}
    assert ours <= set(public_routes())
    assert len(ours) >= 38


def test_every_other_public_route_is_refused_by_its_name() -> None:
    here = served(create_app(None, None))
    for method, path in set(public_routes()) - here:
        error = refusal(method, re.sub(r"\{[a-z_]+\}", "x", path))
        assert error.code == "not-supported"
        assert method in error.message
    assert refusal("GET", "/v1/none").code == "route-unknown"
