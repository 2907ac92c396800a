"""The OpenAPI document is what the gateway does: requests made from it, answers held against it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway_rig import Rig, caller, sqlite_place
from gateway_routes import possessions
from ringfence.config import GatewaySettings
from ringfence.gateway.app import create_app

schema = schemathesis.openapi.from_dict(create_app(None, None).openapi())
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


COUNTED = ("agents", "environments", "sessions", "vaults", "files")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    rig = Rig(
        place=sqlite_place(tmp_path_factory.mktemp("fuzz")),
        settings=GatewaySettings(requests_per_minute=1e9, **dict.fromkeys(COUNTED, 10**9)),
    )
    key = rig.key().text
    with rig.serving() as url:
        yield url, key


HARD = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def held_against_the_document(case: Any, served: tuple[str, str], ids: dict[str, str]) -> None:
    url, key = served
    ends = case.method == "DELETE" or case.path.endswith(("/archive", "/stream"))
    if case.path_parameters and not ends and next(ASKED) % 2:
        # behind an id that nobody has nothing but a 404 would be seen
        case.path_parameters = {name: ids[name] for name in case.path_parameters}
    answer = case.call(base_url=url, headers={"x-api-key": key})
    case.validate_response(answer, checks=CHECKS)
    assert answer.status_code < 500


ASKED = itertools.count()


@pytest.fixture(scope="module")
def ids(served: tuple[str, str]) -> dict[str, str]:
    """One thing of each kind, which no request ends."""
    url, key = served
    with caller(url, key) as client:
        return possessions(client)


@schema.parametrize()
@settings(max_examples=6, **HARD)
def test_every_answer_is_in_the_document(
    case: Any, served: tuple[str, str], ids: dict[str, str]
) -> None:
    held_against_the_document(case, served, ids)


@pytest.mark.storm
@schema.parametrize()
@settings(max_examples=400, **HARD)
def test_every_answer_is_in_the_document_at_length(
    case: Any, served: tuple[str, str], ids: dict[str, str]
) -> None:
    held_against_the_document(case, served, ids)


# a stream of a session that there is does not end
finite = schema.exclude(path_regex="/stream$")


def machine(served: tuple[str, str], seen: Counter[str]) -> Any:
    """Requests that follow each other: what one answer names, the next request is about."""
    url, key = served

    class Following(finite.as_state_machine()):  # type: ignore[misc]
        def get_call_kwargs(self, case: Any) -> dict[str, Any]:
            return {"base_url": url, "headers": {"x-api-key": key}}

        def after_call(self, response: Any, case: Any) -> None:
            if response.status_code == 200 and case.path_parameters:
                seen[f"{case.method} {case.operation.path}"] += 1

        def validate_response(self, response: Any, case: Any, **_: Any) -> None:
            case.validate_response(response, checks=CHECKS)
            assert response.status_code < 500

    return Following


@pytest.mark.storm
def test_what_one_answer_names_is_asked_for_by_the_next(
    served: tuple[str, str],
) -> None:
    seen: Counter[str] = Counter()
    machine(served, seen).run(settings=settings(max_examples=200, stateful_step_count=25, **HARD))
    assert len(seen) >= 5, seen
