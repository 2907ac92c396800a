"""Who we are at AWS, by botocore: what a source of secrets and a login for Bedrock share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import botocore.session
from botocore import credentials as roles
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.utils import InstanceMetadataFetcher

from ringfence.config.providers import AwsLogin
from ringfence.errors import UnavailableError
from ringfence.vault.login import LoginOrder, packed
from ringfence.vault.source import Resolved, denied, expired, unreachable
from ringfence.vault.sources import files

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
AWAY = {
    *("Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequestsException"),
    *("InternalServiceError", "InternalFailure", "ServiceUnavailable", "RequestTimeout"),
}
_STS = "AWS STS"


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """One to assume."""

    arn: str
    external_id: str | None = None
    web_identity_token_file: Path | None = None
    session_name: str = "ringfence"


def options(
    region: str, endpoint: str | None, ca_file: Path | None, timeout: float
) -> dict[str, Any]:
    """Of a client of botocore's."""
    verify: str | bool = str(ca_file) if ca_file else True
    config = Config(
        connect_timeout=timeout,
        read_timeout=timeout,
        retries={"total_max_attempts": 2, "mode": "standard"},
    )
    return {"region_name": region, "endpoint_url": endpoint, "verify": verify, "config": config}


def fetcher(session: Any, role: Role, source: Any, own: dict[str, Any]) -> Any:
    """What assumes it: `fetch_credentials()`. `source` is who assumes, not used by web identity."""

    def client(name: str, **more: Any) -> Any:
        # a web identity's fetcher has a Config of its own, which says not to sign: beside ours,
        # in whose place the time limits would be botocore's minutes
        config = own["config"].merge(more.pop("config", None) or Config())
        return session.create_client(name, **{**own, **more, "config": config})

    extra = {"ExternalId": role.external_id} if role.external_id else {}
    extra["RoleSessionName"] = role.session_name
    if role.web_identity_token_file is not None:
        return roles.AssumeRoleWithWebIdentityCredentialFetcher(
            client_creator=client,
            web_identity_token_loader=roles.FileWebIdentityTokenLoader(
                str(role.web_identity_token_file)
            ),
            role_arn=role.arn,
            extra_args=extra,
        )
    if source is None:
        raise NoCredentialsError
    return roles.AssumeRoleCredentialFetcher(
        client_creator=client, source_credentials=source, role_arn=role.arn, extra_args=extra
    )


def shared_file(file: Path | None, profile: str | None) -> Any:
    """A session whose credentials are those of a file."""
    session = botocore.session.Session(profile=profile)
    if file is not None:
        session.set_config_variable("credentials_file", str(file))
    return session


def refusal(source: str, about: str, error: ClientError) -> UnavailableError:
    """By the code alone: the message may repeat what was sent."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in EXPIRED:
        return expired(source, "the credentials of this host have expired")
    if code in AWAY or status >= 500 or status == 429:
        return unreachable(source, f"it answers {code[:64] or status}")
    return denied(source, f"{about}: {code[:64] or status}")


class _Metadata(InstanceMetadataFetcher):  # type: ignore[misc]
    """botocore's says `{}` of a service that is away as of one that has no role: the one is worth
    another try with the keys that there are, and the other takes them away.
    """

    no_role = False

    def _needs_retry_for_role_name(self, response: Any) -> bool:
        self.no_role = response.status_code == 404
        return bool(super()._needs_retry_for_role_name(response))


class BedrockLogin:
    """What requests to Bedrock are signed with."""

    def __init__(self, order: LoginOrder, metadata: str | None = None) -> None:
        """`metadata`: of an instance's service, where it is not at its own address."""
        assert isinstance(order.login, AwsLogin)  # noqa: S101  by kind
        self._login, self._order, self._metadata = order.login, order, metadata
        self._own = options(
            order.region, order.login.sts_endpoint, order.login.ca_file, order.timeout
        )

    def resolve(self) -> Resolved:
        """See Login."""
        about = self._login.role_arn or "these credentials"
        try:
            return _given(self._found())
        except ClientError as error:
            raise refusal(_STS, about, error) from None
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            raise denied(
                _STS,
                f"there are no credentials here ({type(error).__name__})",
                "providers.NAME.aws: credential, credentials_file, web_identity_token_file or host",
            ) from None
        except FileNotFoundError:
            raise denied(_STS, "the file of the web identity is not there") from None
        except (BotoCoreError, OSError) as error:
            raise unreachable(_STS, type(error).__name__) from None

    def close(self) -> None:
        """See Login."""

    def _found(self) -> dict[str, Any]:
        login = self._login
        session, source = self._base()
        if login.role_arn is None:
            return _own(source)
        role = Role(
            arn=login.role_arn,
            external_id=login.external_id,
            web_identity_token_file=login.web_identity_token_file,
            session_name=login.session_name,
        )
        # a new one each time: one that is kept hands out what it assumed before
        assumed: dict[str, Any] = fetcher(session, role, source, self._own).fetch_credentials()
        return assumed

    def _base(self) -> tuple[Any, Any]:
        """A session, and who we are before a role; nobody for a web identity."""
        login = self._login
        if login.credentials_file is not None:
            files.private(login.credentials_file)
            session = shared_file(login.credentials_file, login.profile)
            session.set_config_variable("config_file", os.devnull)  # of whoever's home this is
            only: Callable[..., Any] = roles.SharedCredentialProvider
            held = only(str(login.credentials_file), login.profile or "default").load()
            if held is None:
                raise NoCredentialsError
            return session, held
        session = botocore.session.Session()
        session.set_config_variable("config_file", os.devnull)  # of whoever's home this is
        if login.credential is not None:
            return session, _static(self._order.value())
        return session, self._host() if login.host else None

    def _host(self) -> Any:
        """The container's role, where the environment names one, or the instance's; no other of
        the many places where botocore looks.
        """
        container = roles.ContainerProvider().load()
        if container is not None:
            return container
        where = {"base_url": self._metadata} if self._metadata else {}
        fetcher = _Metadata(
            timeout=self._order.timeout,
            num_attempts=2,
            config={"ec2_metadata_v1_disabled": True},
            **where,
        )
        found = fetcher.retrieve_iam_role_credentials()
        if not found and fetcher.no_role:
            raise NoCredentialsError
        if not found:
            raise unreachable("the metadata service of this host", "it gives no credentials now")
        held = roles.Credentials(found["access_key"], found["secret_key"], found["token"])
        held.ends = found["expiry_time"]
        return held


def _static(value: bytes) -> Any:
    parts = value.decode("ascii").split(":")
    if len(parts) not in {2, 3} or not all(parts):
        raise UnavailableError(
            "secret-unfit",
            "a credential of aws is not ACCESS_KEY_ID:SECRET_ACCESS_KEY[:SESSION_TOKEN]",
            hint="ringfence vault set NAME",
        )
    return roles.Credentials(*parts)


def _own(held: Any) -> dict[str, Any]:
    """Credentials that are used as they are."""
    frozen = held.get_frozen_credentials()
    ends = getattr(held, "ends", None) or getattr(held, "_expiry_time", None)
    return {
        "access_key": frozen.access_key,
        "secret_key": frozen.secret_key,
        "token": frozen.token,
        "expiry_time": ends,
    }


def _given(found: dict[str, Any]) -> Resolved:
    ends = found["expiry_time"]
    if isinstance(ends, str):
        ends = datetime.fromisoformat(ends)
    lease = None if ends is None else (ends - datetime.now(UTC)).total_seconds()
    key, token = str(found["access_key"]), str(found["token"] or "")
    value = packed({"key": key, "secret": str(found["secret_key"]), "token": token})
    # a key's id is public: AWS names it in its own logs
    version = key if not token else hashlib.sha256(token.encode()).hexdigest()[:12]
    return Resolved(value=value, version=version, lease_seconds=lease)
