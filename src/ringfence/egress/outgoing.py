"""One try of a model request made for its provider: dialect, credential, signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ringfence.channel.messages import ProviderConfig
from ringfence.egress.aside import heavy
from ringfence.egress.credentials import CredentialError, Injection
from ringfence.egress.model import Admitted
from ringfence.egress.model.dialects import (
    Answering,
    Asked,
    Call,
    Direct,
    Form,
    FromBedrock,
    FromVertex,
    Unserved,
    made,
)
from ringfence.egress.model.residency import refusal
from ringfence.egress.sandboxes import Leg, SandboxState, Target

Sign = Callable[..., tuple[tuple[bytes, bytes], ...]]
"""`ringfence.egress.signing.sign`."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What is sent, but for framing. answering: how the answer is read."""

    call: Call
    injection: Injection | None
    answering: Answering


async def outgoing(
    state: SandboxState, provider: ProviderConfig, target: Target, leg: Leg, admitted: Admitted
) -> Outgoing | Unserved:
    """A try of an admitted request.

    Raises:
        CredentialError: what it must be asked with is not to be had.
    """
    model_id = provider.models.get(leg.model)
    if provider.kind != "anthropic" and model_id is None:
        return Unserved(403, "model-not-at-provider")
    denied = refusal(state.rules.model, leg.provider, provider, model_id)
    if denied:
        return Unserved(403, denied)
    if provider.kind == "anthropic" and leg.model == admitted.model:
        # as it is: nearly every request, and no part of it is read again
        same = Call(admitted.path_and_query, admitted.headers, admitted.body)
        return Outgoing(same, await _header(state, provider, target, same), Direct())
    asked = _asked(leg, admitted)
    if provider.kind == "bedrock":
        return await _bedrock(state, provider, target, asked)
    if provider.kind == "vertex":
        return await _vertex(state, provider, asked)
    return await _anthropic(state, provider, target, asked)


def _asked(leg: Leg, admitted: Admitted) -> Asked:
    return Asked(
        path_and_query=admitted.path_and_query,
        headers=admitted.headers,
        body=admitted.body,
        model=leg.model,
        own_model=admitted.model,
        streaming=admitted.streaming,
        counts_only=admitted.counts_only,
    )


async def _anthropic(
    state: SandboxState, provider: ProviderConfig, target: Target, asked: Asked
) -> Outgoing | Unserved:
    call = await _made(state, asked, Form(kind="anthropic", models={}))
    if isinstance(call, Unserved):
        return call
    return Outgoing(call, await _header(state, provider, target, call), Direct())


async def _made(state: SandboxState, asked: Asked, form: Form) -> Call | Unserved:
    """A body that is hard to read is made another aside, too, and of one sandbox one at a time."""
    changed = form.kind != "anthropic" or asked.model != asked.own_model
    aside = state.shared.aside
    if aside is None or not changed or not heavy(asked.body):
        return made(asked, form)
    async with state.reading:
        return await aside.make(asked, form)


async def _header(
    state: SandboxState, provider: ProviderConfig, target: Target, call: Call
) -> Injection | None:
    if provider.credential is None:
        return None
    path = call.path.partition("?")[0]
    return await state.credentials.for_model(
        provider.credential, provider.header, target.host, path
    )


async def _bedrock(
    state: SandboxState, provider: ProviderConfig, target: Target, asked: Asked
) -> Outgoing | Unserved:
    call = await _made(state, asked, Form(kind="bedrock", models=provider.models))
    if isinstance(call, Unserved):
        return call
    answering = FromBedrock(renews=provider.renews)
    if not provider.login or provider.credential is None:
        return Outgoing(call, await _header(state, provider, target, call), answering)
    fields = await state.credentials.login(provider.credential)
    if state.shared.sign is None:
        raise CredentialError("credential-missing")
    scheme = "https" if target.tls else "http"
    url = f"{scheme}://{target.host_header}{target.prefix}{call.path}"
    lines = (*call.headers, (b"host", target.host_header.encode()))
    signed = state.shared.sign(url, lines, call.body, provider.region, fields)
    return Outgoing(call, Injection(provider.credential, signed), answering)


async def _vertex(
    state: SandboxState, provider: ProviderConfig, asked: Asked
) -> Outgoing | Unserved:
    fields: dict[str, str] = {}
    injection = None
    if provider.login and provider.credential is not None:
        fields = await state.credentials.login(provider.credential)
        line = (b"authorization", b"Bearer " + fields["token"].encode())
        injection = Injection(provider.credential, (line,))
    project = provider.project or fields.get("project") or ""
    if not project:
        return Unserved(403, "provider-project-missing")
    form = Form(kind="vertex", models=provider.models, project=project, region=provider.region)
    call = await _made(state, asked, form)
    if isinstance(call, Unserved):
        return call
    return Outgoing(call, injection, FromVertex(renews=provider.renews))
