"""AWS Secrets Manager, by botocore: it signs, finds the host's role, and assumes another."""

from __future__ import annotations

from functools import partial
from typing import Any

from botocore.credentials import DeferredRefreshableCredentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)

from ringfence.config.reference import Reference
from ringfence.config.secrets import AwsService
from ringfence.errors import UnavailableError
from ringfence.vault.source import Resolved, absent, denied, text_or_field, unfit, unreachable
from ringfence.vault.sources import aws_role

_NAME = "AWS Secrets Manager"
_ABSENT = {"ResourceNotFoundException", "InvalidRequestException"}


class AwsSource:
    """`aws-sm://name` and `aws-sm://name#field`."""

    def __init__(self, service: AwsService, timeout: float) -> None:
        self._service, self._timeout = service, timeout
        self._client: Any = None

    def resolve(self, reference: Reference, *, doubted: bool = False) -> Resolved:  # noqa: ARG002  read anew each time
        """See SecretSource."""
        try:
            if self._client is None:
                self._client = self._made()
            answer = self._client.get_secret_value(SecretId=reference.path)
        except ClientError as error:
            raise _refusal(reference, error) from None
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            raise denied(
                _NAME,
                f"this host has no credentials ({type(error).__name__})",
                "secrets.aws: profile, web_identity_token_file, or a role of this host",
            ) from None
        except (HTTPClientError, CredentialRetrievalError, BotoCoreError, OSError) as error:
            raise unreachable(_NAME, type(error).__name__) from None
        if not isinstance(answer.get("SecretString"), str):
            raise unfit(reference, "it is binary")
        value = text_or_field(reference, answer["SecretString"].encode())
        return Resolved(value=value, version=str(answer.get("VersionId", ""))[:64])

    def close(self) -> None:
        """See SecretSource."""
        if self._client is not None:
            self._client.close()

    def _made(self) -> Any:
        service = self._service
        session = aws_role.shared_file(service.credentials_file, service.profile)
        own = partial(
            aws_role.options, service.region, ca_file=service.ca_file, timeout=self._timeout
        )
        if service.role_arn is not None:
            role = aws_role.Role(
                arn=service.role_arn,
                external_id=service.external_id,
                web_identity_token_file=service.web_identity_token_file,
            )
            web = role.web_identity_token_file is not None
            source = None if web else session.get_credentials()
            fetcher = aws_role.fetcher(session, role, source, own(endpoint=service.sts_endpoint))
            # botocore takes them anew before they end
            session._credentials = DeferredRefreshableCredentials(  # noqa: SLF001  no other way in
                method="assume-role", refresh_using=fetcher.fetch_credentials
            )
        return session.create_client("secretsmanager", **own(endpoint=service.endpoint))


def _refusal(reference: Reference, error: ClientError) -> UnavailableError:
    if str(error.response.get("Error", {}).get("Code", "")) in _ABSENT:
        return absent(reference)
    return aws_role.refusal(_NAME, str(reference), error)
