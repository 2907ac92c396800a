"""The OpenAPI document is what the gateway does: requests made from it, answers held against it."""

from __future__ import annotations

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

from gateway_rig import Rig, sqlite_place
from ringfence.config import GatewaySettings
from ringfence.gateway.app import create_app

schema = schemathesis.openapi.from_dict(create_app(None, None).openapi())
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    rig = Rig(
        place=sqlite_place(tmp_path_factory.mktemp("fuzz")),
        settings=GatewaySettings(requests_per_minute=1e9, agents=10**9, environments=10**9),
    )
    key = rig.key().text
    with rig.serving() as url:
        yield url, key


HARD = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def held_against_the_document(case: Any, served: tuple[str, str]) -> None:
    url, key = served
    answer = case.call(base_url=url, headers={"x-api-key": key})
    case.validate_response(answer, checks=CHECKS)
    assert answer.status_code < 500


@schema.parametrize()
@settings(max_examples=12, **HARD)
def test_every_answer_is_in_the_document(case: Any, served: tuple[str, str]) -> None:
    held_against_the_document(case, served)


@pytest.mark.storm
@schema.parametrize()
@settings(max_examples=400, **HARD)
def test_every_answer_is_in_the_document_at_length(case: Any, served: tuple[str, str]) -> None:
    held_against_the_document(case, served)
