"""The same model behind Bedrock's and Vertex AI's forms of the API: routes, frames, errors.

With keys it checks what a cloud checks: the signature of each request over its body, or the bearer
token. Streams of Bedrock are event streams with their sums, and what goes wrong within one is an
exception in it, as AWS has them.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ringfence.config.modelnames import canonical, undated
from ringfence.egress.model.dialects.eventstream import encode
from ringfence.egress.model.dialects.requests import BEDROCK_VERSION, VERTEX_VERSION

_EVENT_STREAM = "application/vnd.amazon.eventstream"
_MODEL = re.compile(r"/model/([^/]+)/(invoke|invoke-with-response-stream)\Z")
_PREDICT = re.compile(
    r"(?:/v1)?/projects/([^/]+)/locations/([^/]+)/publishers/anthropic/models/"
    r"([^/:]+):(rawPredict|streamRawPredict)\Z"
)
_EXCEPTIONS = {
    400: "ValidationException",
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    408: "ModelTimeoutException",
    429: "ThrottlingException",
    500: "InternalServerException",
    529: "ServiceUnavailableException",
}
_STREAMED = {
    "rate_limit_error": "throttlingException",
    "invalid_request_error": "validationException",
    "overloaded_error": "serviceUnavailableException",
    "timeout_error": "modelTimeoutException",
}
_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


@dataclass
class Clouds:
    """Who may ask, and how. May change while it serves: keys rotate.

    Attributes:
        keys: AWS's, `ACCESS_KEY_ID` to (secret, session token or None); empty checks no signature.
        region: that a signature must be for.
        expired: ids of keys whose session is over.
        tokens: bearer tokens; empty checks none.
    """

    keys: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    region: str = "us-east-1"
    expired: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Form:
    """One request in a cloud's form, and what it is in the Messages API's."""

    body: dict[str, Any]
    answer: Callable[[Response], Response]
    counts: bool = False


def problem_of(request: Request, raw: bytes, clouds: Clouds) -> Response | None:
    """Why a cloud would not answer at all."""
    if _MODEL.search(request.url.path):
        return _signature_problem(request, raw, clouds)
    shown = request.headers.get("authorization", "").removeprefix("Bearer ")
    if clouds.tokens and shown not in clouds.tokens:
        return _google(401, "Request had invalid authentication credentials.")
    return None


def form_of(path: str, body: Mapping[str, Any]) -> Form | Response | None:
    """None for a path that is no cloud's."""
    found = _MODEL.search(path)
    if found is not None:
        return _bedrock(unquote(found[1]), body, streams=found[2].endswith("stream"))
    found = _PREDICT.search(path)
    return None if found is None else _vertex(found[3], body, streams=found[4][0] == "s")


def _bedrock(model_id: str, body: Mapping[str, Any], *, streams: bool) -> Form | Response:
    if body.get("anthropic_version") != BEDROCK_VERSION and not _dated(body):
        return _aws(400, f"anthropic_version: Input should be '{BEDROCK_VERSION}'")
    if extra := body.keys() & {"model", "stream"}:
        return _aws(400, f"{min(extra)}: Extra inputs are not permitted")
    if problem := _role_problem(body) or _thinking_problem(body):
        return _aws(400, problem)
    said = {**body, "model": undated(canonical(model_id)), "stream": streams}
    return Form(body=said, answer=_framed if streams else _aws_error)


def _role_problem(body: Mapping[str, Any]) -> str:
    messages = body.get("messages")
    found = messages if isinstance(messages, list) else []
    roles = {one.get("role") for one in found if isinstance(one, dict)}
    odd = sorted(str(role) for role in roles - {"user", "assistant"})
    return f"messages: Unexpected role {odd[0]}" if odd else ""


def _thinking_problem(body: Mapping[str, Any]) -> str:
    """A way to show thinking that is behind a flag which no cloud has."""
    thinking = body.get("thinking")
    display = thinking.get("display") if isinstance(thinking, dict) else None
    known = display in (None, "summarized", "omitted")
    return "" if known else "thinking.display: Input should be 'summarized' or 'omitted'"


def _vertex(model_id: str, body: Mapping[str, Any], *, streams: bool) -> Form | Response:
    counts = model_id == "count-tokens"
    if body.get("anthropic_version") != VERTEX_VERSION and not _dated(body):
        return _google(400, f"anthropic_version: Input should be '{VERTEX_VERSION}'")
    if not counts and ("model" in body or streams is not (body.get("stream") is True)):
        return _google(400, "model: Extra inputs are not permitted")
    if problem := _role_problem(body) or _thinking_problem(body):
        return _google(400, problem)
    name = str(body.get("model", "")) if counts else model_id
    return Form(
        body={**body, "model": undated(canonical(name))}, answer=_google_error, counts=counts
    )


def _dated(body: Mapping[str, Any]) -> bool:
    """The Messages API's own version, which newer clients send to clouds, too."""
    return re.fullmatch(r"\d{4}-\d\d-\d\d", str(body.get("anthropic_version"))) is not None


def _aws(status: int, message: str, code: str = "") -> Response:
    kind = code or _EXCEPTIONS.get(status, "InternalServerException")
    headers = {"x-amzn-errortype": f"{kind}:http://internal.amazon.com/", "x-amzn-requestid": "r-1"}
    sent = 503 if status == 529 else status
    return JSONResponse({"message": message}, sent, headers=headers)


def _google(status: int, message: str) -> Response:
    sent = 503 if status == 529 else status
    error = {"code": sent, "message": message, "status": _CODES.get(sent, "UNKNOWN")}
    return JSONResponse({"error": error}, sent)


def _said(answer: Response) -> str:
    return str(json.loads(bytes(answer.body))["error"]["message"])


def _aws_error(answer: Response) -> Response:
    return answer if answer.status_code < 400 else _aws(answer.status_code, _said(answer))


def _google_error(answer: Response) -> Response:
    return answer if answer.status_code < 400 else _google(answer.status_code, _said(answer))


def _framed(answer: Response) -> Response:
    if not isinstance(answer, StreamingResponse):
        return _aws_error(answer)
    return StreamingResponse(
        _frames(answer.body_iterator), media_type=_EVENT_STREAM, headers={"x-amzn-requestid": "r-1"}
    )


async def _frames(events: Any) -> AsyncIterator[bytes]:
    """Of server-sent events, each of which comes whole."""
    async for event in events:
        data = event.split(b"data: ", 1)[1].rstrip(b"\n")
        value = json.loads(data)
        if value["type"] == "error":
            kind = _STREAMED.get(value["error"]["type"], "internalServerException")
            headers = {":exception-type": kind, ":message-type": "exception"}
            message = json.dumps({"message": value["error"]["message"]}).encode()
            yield encode({**headers, ":content-type": "application/json"}, message)
            return
        if value["type"] == "message_stop":
            value["amazon-bedrock-invocationMetrics"] = {"inputTokenCount": 1}
        inner = base64.b64encode(json.dumps(value).encode()).decode()
        headers = {":event-type": "chunk", ":content-type": "application/json"}
        payload = json.dumps({"bytes": inner, "p": "abcdefgh"}).encode()
        yield encode({**headers, ":message-type": "event"}, payload)


_CREDENTIAL = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/,]+)/(\d{8})/([^/,]+)/bedrock/aws4_request, "
    r"SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})\Z"
)


def _signature_problem(request: Request, raw: bytes, clouds: Clouds) -> Response | None:
    shown = request.headers.get("authorization", "")
    if not clouds.keys:
        good = not clouds.tokens or shown.removeprefix("Bearer ") in clouds.tokens
        return None if good else _aws(403, "bad API key", "UnrecognizedClientException")
    found = _CREDENTIAL.match(shown)
    if found is None:
        return _aws(403, "Missing Authentication Token", "MissingAuthenticationTokenException")
    key, _, region, names, _ = found.groups()
    secret, token = clouds.keys.get(key, ("", None))
    signature = "InvalidSignatureException"
    if not secret or token != request.headers.get("x-amz-security-token"):
        wrong = f"The security token {key} is invalid.", "UnrecognizedClientException"
    elif key in clouds.expired:
        wrong = f"The security token {token} has expired", "ExpiredTokenException"
    elif region != clouds.region:
        wrong = f"Credential should be scoped to {clouds.region}", signature
    elif _signed(request, raw, (key, secret, token), region, names.split(";")) != shown:
        wrong = f"The signature of {token} does not match", signature
    else:
        return None
    return _aws(403, *wrong)


def _signed(
    request: Request, raw: bytes, who: tuple[str, str, str | None], region: str, names: list[str]
) -> str:
    """The authorization that botocore would write for what arrived, at the time that it names."""
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    path = request.scope["raw_path"].decode("ascii").partition("?")[0]
    made = AWSRequest(
        method=request.method,
        url=f"{request.url.scheme}://{request.headers['host']}{path}",
        data=raw,
        headers={name: request.headers.get(name, "") for name in names},
    )
    made.context["timestamp"] = request.headers.get("x-amz-date", "")
    signer = SigV4Auth(Credentials(*who), "bedrock", region)
    canonical_request = signer.canonical_request(made)
    text = signer.string_to_sign(made, canonical_request)
    listed = ";".join(sorted(name.lower() for name in names))
    scope = signer.credential_scope(made)
    return (
        f"AWS4-HMAC-SHA256 Credential={who[0]}/{scope}, SignedHeaders={listed}, "
        f"Signature={signer.signature(text, made)}"
    )
