"""What one connection may ask: decided from heads alone, before a byte goes out."""

from __future__ import annotations

from ringfence.egress.head import Head, HeadError
from ringfence.egress.model.exchange import COUNT_TOKENS, MESSAGES
from ringfence.egress.sandboxes import MODEL_HOST, PUBLIC_MODEL_HOST, SandboxState
from ringfence.policy.compiled import HostRule
from ringfence.policy.decide import decide_host, decide_request, host_rule

_PLAIN_HOSTS = frozenset({MODEL_HOST, PUBLIC_MODEL_HOST, f"{PUBLIC_MODEL_HOST}:443"})
_ROUTE = frozenset({MESSAGES, COUNT_TOKENS})


class Gate:
    """The target of one connection and the rule that granted it.

    Attributes:
        target: host and port of the tunnel; None on the plain model route.
        rule: what granted the target; None where only the model route leads there.
    """

    def __init__(self, sandbox: SandboxState) -> None:
        self._sandbox = sandbox
        self.target: tuple[str, int] | None = None
        self.rule: HostRule | None = None

    def admit(self, host: str, port: int) -> None:
        """Take a target, or raise HeadError."""
        sandbox = self._sandbox
        decision = decide_host(sandbox.rules, host, port)
        rule = host_rule(sandbox.rules, host, port) if decision.allowed else None
        if rule is None:
            blocked = decision.reason == "port-blocked"
            if blocked or not (sandbox.rules.model.enabled and self._is_model(host, port)):
                raise HeadError(403, decision.reason)
        if sandbox.shared.authority is None and (rule is None or not rule.opaque):
            raise HeadError(403, "no-authority")
        self.target, self.rule = (host, port), rule

    def judge(self, head: Head) -> None:
        """Everything that a request's head alone can decide. Raises HeadError."""
        if self.target is None:
            self._judge_plain(head)
        else:
            self._judge_inside(head, *self.target)

    def to_model(self, head: Head) -> bool:
        """Whether a request is one to the model: always by our rules, never around them."""
        if self.target is None:
            return True
        path = head.target.partition("?")[0]
        if not self._is_model(*self.target):
            return False
        return self.rule is None or path in _ROUTE

    @property
    def literal(self) -> bool:
        """The target is the operator's own provider by address: there is nothing to resolve."""
        target = self._sandbox.model_target
        return self.rule is None and target is not None and target.literal

    def _judge_plain(self, head: Head) -> None:
        """Plain HTTP is the model route and nothing else."""
        if head.host.lower() not in _PLAIN_HOSTS or not head.target.startswith("/"):
            raise HeadError(403, "plain-http")
        self._judge_model(head)

    def _judge_model(self, head: Head) -> None:
        if not self._sandbox.rules.model.enabled:
            raise HeadError(403, "model-route-closed")
        if head.target.partition("?")[0] not in _ROUTE:
            raise HeadError(403, "path-not-granted")
        if head.method != "POST":
            raise HeadError(405, "method-not-granted")

    def _judge_inside(self, head: Head, host: str, port: int) -> None:
        """Inside a terminated tunnel: Host is the tunnel's host, the target in origin form."""
        if head.host.lower().removesuffix(".") not in {host, f"{host}:{port}"}:
            raise HeadError(421, "host-mismatch")
        if not head.target.startswith("/"):
            raise HeadError(400, "target-form")
        if self.to_model(head):
            self._judge_model(head)
            return
        if self.rule is None:
            raise HeadError(403, "path-not-granted")
        if self._is_model(host, port):
            _keep_off_the_route(head.target.partition("?")[0], self.rule)
        decision = decide_request(self.rule, head.method, head.target, own_field=self._own_field())
        if not decision.allowed:
            raise HeadError(403, decision.reason)

    def _own_field(self) -> str:
        """The query field that a credential will be set in, whatever the request says there."""
        name = self.rule.credential if self.rule is not None else None
        credentials = self._sandbox.rules.credentials
        return next((each.query or "" for each in credentials if each.name == name), "")

    def _is_model(self, host: str, port: int) -> bool:
        if (host, port) == (PUBLIC_MODEL_HOST, 443):
            return True
        target = self._sandbox.model_target
        return target is not None and (target.host, target.port) == (host, port)


def _keep_off_the_route(path: str, rule: HostRule) -> None:
    """A grant on the model's host must not lead to the model past its rules: another spelling of
    the route (encoded, upper case, a slash at the end) is refused, and what lies below it, such
    as batches, passes only where the policy names that very path. Raises HeadError.
    """
    if "%" in path or ";" in path:
        raise HeadError(403, "path-not-normal")
    if path.lower().startswith(MESSAGES) and path not in {grant.path for grant in rule.paths}:
        raise HeadError(403, "path-not-granted")
