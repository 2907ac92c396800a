"""Bearer tokens of an OpenID Connect issuer: from a JWT and the issuer's keys to a caller.

RFC 7519, RFC 7517, RFC 8725 (best practices). What verifies is settled before a token is read: the
algorithms by the operator, the key by the issuer's set, and the pair by the key's own kind, so that
a public key is never a shared secret and `none` is nobody's. A token's header chooses among those
keys and nothing else: `jku`, `x5u`, `jwk` and `x5c` are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from ringfence.config import OidcSettings
from ringfence.errors import DeniedError

MAX_TOKEN = 8192
_MAX_KEYS = 64
_TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
_CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}

# by class, the most special first: what a token's bearer is told
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (jwt.ExpiredSignatureError, "it has expired"),
    (jwt.ImmatureSignatureError, "it is not valid yet"),
    (jwt.InvalidIssuerError, "another issuer made it"),
    (jwt.MissingRequiredClaimError, "it lacks a claim that is needed"),
    (jwt.InvalidAlgorithmError, "its algorithm is not one that is used here"),
    (jwt.InvalidSignatureError, "its signature does not hold"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Who a token speaks for. tenant: its name; scopes: those of its roles."""

    subject: str
    tenant: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Choice:
    """What a token's header says of the key. kid: None when it names none."""

    kid: str | None
    algorithm: str


class Keys:
    """An issuer's set, each key with the algorithms that it may be used with."""

    def __init__(self, keys: Mapping[tuple[str | None, str], jwt.PyJWK]) -> None:
        self._keys = dict(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, choice: Choice) -> jwt.PyJWK | None:
        """The key; without a `kid` the only one there is for the algorithm."""
        if choice.kid is not None:
            return self._keys.get((choice.kid, choice.algorithm))
        fitting = [key for (_, used), key in self._keys.items() if used == choice.algorithm]
        return fitting[0] if len(fitting) == 1 else None


def keys_of(document: bytes, settings: OidcSettings) -> Keys:
    """The keys of a JWK set that verify signatures with an algorithm of the settings; others are
    left out, as RFC 7517 section 5 says.

    Raises:
        ValueError: when it is no JWK set, or none of its keys can be used.
    """
    try:
        value = json.loads(document)
        listed = value["keys"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError("not a JWK set") from None
    if not isinstance(listed, list) or len(listed) > _MAX_KEYS:
        raise ValueError("not a JWK set of a usual size")
    found: dict[tuple[str | None, str], jwt.PyJWK] = {}
    twice: set[tuple[str | None, str]] = set()
    for data in listed:
        for algorithm in _algorithms(data, settings):
            try:
                key = jwt.PyJWK(data, algorithm)
            except (jwt.PyJWTError, ValueError, TypeError):
                continue
            place = (data.get("kid"), algorithm)
            twice |= {place} & found.keys()
            found[place] = key
    usable = {place: key for place, key in found.items() if place not in twice}
    if not usable:
        raise ValueError("no key in it can be used")
    return Keys(usable)


def _algorithms(data: Any, settings: OidcSettings) -> tuple[str, ...]:
    """What a key may verify: its own kind's, of those that the operator has named."""
    if not isinstance(data, dict) or not isinstance(data.get("kid"), str | None):
        return ()
    operations = data.get("key_ops")
    if data.get("use", "sig") != "sig" or (
        operations is not None and (not isinstance(operations, list) or "verify" not in operations)
    ):
        return ()
    kind, curve = data.get("kty"), data.get("crv")
    if kind == "RSA":
        fitting = [name for name in settings.algorithms if name[:2] in {"RS", "PS"}]
    elif kind == "EC":
        fitting = [name for name in settings.algorithms if name == _CURVES.get(str(curve))]
    elif kind == "OKP" and curve == "Ed25519":
        fitting = [name for name in settings.algorithms if name == "EdDSA"]
    else:
        # a symmetric key in a public document is a mistake, and would make anybody an issuer
        fitting = []
    stated = data.get("alg")
    return tuple(name for name in fitting if stated is None or stated == name)


def is_token(text: str) -> bool:
    """Whether a bearer's text has the form of a JWT; an API key has none."""
    return text.count(".") == 2


def choice_of(text: str, settings: OidcSettings) -> Choice:
    """Which key a token wants. Nothing of it is trusted yet.

    Raises:
        DeniedError: `token-invalid`.
    """
    if len(text) > MAX_TOKEN or not text.isascii():
        raise _invalid("it is too long")
    try:
        header = jwt.get_unverified_header(text)
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise _invalid("it is malformed") from None
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.lower() not in _TYPES or "crit" in header:
        # a token that was made for something else, such as a logout (RFC 8725, 3.11)
        raise _invalid("it is of another type")
    algorithm = header.get("alg")
    if algorithm not in settings.algorithms:
        raise _invalid("its algorithm is not one that is used here")
    kid = header.get("kid")
    if kid is not None and (not isinstance(kid, str) or len(kid) > 256):
        raise _invalid("it is malformed")
    return Choice(kid, algorithm)


def unknown_key() -> DeniedError:
    """For a token whose key the issuer does not have."""
    return _invalid("the issuer has no such key")


def identity_of(text: str, key: jwt.PyJWK, settings: OidcSettings) -> Identity:
    """Who a token speaks for, when the key made it for us, and its time has come and is not over.

    Raises:
        DeniedError: `token-invalid`.
    """
    try:
        claims = jwt.decode(
            text,
            key,
            algorithms=[key.algorithm_name],
            issuer=settings.issuer,
            leeway=settings.leeway_seconds,
            options={
                "require": ["exp", "iat", "iss", "aud", "sub"],
                # below: the library takes one of several
                "verify_aud": False,
                "enforce_minimum_key_length": True,
            },
        )
    except (jwt.PyJWTError, ValueError, OverflowError, RecursionError) as error:
        reasons = (reason for kind, reason in _REASONS if isinstance(error, kind))
        raise _invalid(next(reasons, "it is malformed")) from None
    if claims["aud"] not in (settings.audience, [settings.audience]):
        # one that is good elsewhere, too, could be brought here by whoever got it there
        raise _invalid("it is not for this gateway alone")
    return Identity(
        subject=_text(claims["sub"], 200, "sub"),
        tenant=_text(_claim(claims, settings.tenant_claim), 64, settings.tenant_claim),
        scopes=_scopes(_claim(claims, settings.role_claim), settings),
    )


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """A claim by its whole name, or by a path with dots, as `realm_access.roles`."""
    if name in claims:
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _text(value: Any, most: int, name: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= most or not value.isprintable():
        raise _invalid(f"its claim {name} is not a usual text")
    return value


def _scopes(value: Any, settings: OidcSettings) -> frozenset[str]:
    """Of the roles that the operator has named; the rest give nothing. A text holds several,
    parted by blanks, as `scope` does (RFC 8693, 4.2).
    """
    roles = value.split(" ") if isinstance(value, str) else value
    if not isinstance(roles, list):
        return frozenset()
    known = [
        settings.roles[role] for role in roles if isinstance(role, str) and role in settings.roles
    ]
    return frozenset(scope for scopes in known for scope in scopes)


def _invalid(reason: str) -> DeniedError:
    return DeniedError("token-invalid", f"invalid token: {reason}")
