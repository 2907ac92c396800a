"""A cloud that answers what is no answer: another is tried, and the first has failed."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.channel.messages import ModelCalled
from ringfence.egress.exchange import Exchange
from ringfence.egress.model import Cut
from ringfence.egress.model.dialects.answers import FromBedrock
from ringfence.egress.model.exchange import ModelExchange, RunState
from ringfence.egress.redact import Needles, Redactor
from ringfence.egress.sandboxes import SandboxState
from ringfence.egress.turns import Ticket
from ringfence.policy.compiled import ModelRules

EVENTS = [(b"content-type", b"application/vnd.amazon.eventstream")]
PAGE = [(b"content-type", b"text/html")]


def exchange(*, again: bool) -> tuple[Exchange, list[tuple[int, str, str]]]:
    """One try, with its head sent. again: whether another may follow."""
    refused: list[tuple[int, str, str]] = []
    client: Any = SimpleNamespace(
        loop=asyncio.get_running_loop(),
        paused=False,
        send=lambda _: None,
        refuse=lambda *what: refused.append(what),
    )
    turns = SimpleNamespace(heard=lambda *_: None, began=lambda *_: None)
    state: Any = SimpleNamespace(
        redactor=lambda: Redactor(lambda: Needles(())),
        shared=SimpleNamespace(turns=turns),
        credentials=None,
    )
    made = Exchange(client, state, SimpleNamespace(modern=True, method="POST"))  # type: ignore[arg-type]
    rules = ModelRules()
    made._model = ModelExchange(rules, RunState(rules))
    made._answering = FromBedrock(renews=False)
    made._ticket = Ticket(sandbox_id="s", number=1) if again else None
    return made, refused


@pytest.mark.parametrize(
    ("status", "headers", "body", "fault"),
    [
        (302, [(b"location", b"https://elsewhere.example.com/")], b"", "upstream-answer-status"),
        (200, PAGE, b"", "upstream-answer-type"),
        (200, EVENTS, b"<html>no frame at all</html>", "upstream-answer-malformed"),
    ],
)
async def test_what_is_no_answer_is_followed_by_another_try(
    status: int, headers: list[tuple[bytes, bytes]], body: bytes, fault: str
) -> None:
    made, refused = exchange(again=True)
    made.answer_head(status, headers)
    if body:
        made.answer_body(body)
    assert (made._fault, refused) == (fault, [])
    last, refused = exchange(again=False)
    last.answer_head(status, headers)
    if body:
        last.answer_body(body)
    assert last._fault == ""
    assert refused[0][1] == fault.removeprefix("upstream-")


@pytest.mark.parametrize("reason", ["tool-use-not-granted", "answer-too-large"])
async def test_what_goes_beyond_the_grant_is_refused(reason: str) -> None:
    made, refused = exchange(again=True)
    made._cut(Cut(reason, b""))
    assert refused == [(403, reason, "model answer")]
    assert made._fault == ""


def test_what_is_free_hides_nothing_that_is_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting tokens is free, and so is a request that the provider refuses."""
    monkeypatch.setattr("ringfence.egress.sandboxes._MAX_FREE", 2)
    told: list[Any] = []
    rules: Any = SimpleNamespace(credentials=(), model=ModelRules(provider="anthropic"))
    shared: Any = SimpleNamespace(providers={}, tell=lambda one: told.append(ModelCalled(**one)))
    state = SandboxState(
        sandbox_id="s",
        run_id="r",
        session_id="t",
        rules=rules,
        shared=shared,
        run=RunState(rules.model),
        credentials=None,  # type: ignore[arg-type]
    )
    for _ in range(50):
        state.next_request()  # each counts tokens
    for number, tokens in enumerate([0, 0, 0, 5, 0, 7]):
        state.called(f"req_{number}", provider="anthropic", model="m")
        status = 200 if tokens else 400
        state.called(f"req_{number}", over=True, status=status, model="m", output_tokens=tokens)
    heard = [(one.request_id, one.over) for one in told]
    assert heard == [(f"req_{n}", over) for n in (0, 1, 3, 5) for over in (False, True)]
    assert state._untold == {}
