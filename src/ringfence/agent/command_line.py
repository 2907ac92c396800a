"""`claude`'s command line and environment inside the fence.

The SDK builds the argument list only for a process that it starts itself; its builder is private
and is borrowed in this one place, held by a test that pins the SDK's version.
"""

from __future__ import annotations

from claude_agent_sdk import ClaudeAgentOptions
from claude_agent_sdk._internal.transport.subprocess_cli import SubprocessCLITransport

from ringfence.agent.subagents import PER_SESSION
from ringfence.policy.compiled import ToolGrants
from ringfence.record.transcript import PROJECT
from ringfence.sandbox.protocol import (
    INSIDE_CLAUDE,
    INSIDE_EGRESS_SOCKET,
    INSIDE_HOME,
    INSIDE_PROXY_PORT,
)

CONFIG_DIR = f"{INSIDE_HOME}/.claude"
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
PLACEHOLDER = "ringfence-placeholder"
"""What stands for a key inside. Egress drops it and sets the real one."""


def argv(options: ClaudeAgentOptions) -> list[str]:
    """Arguments for the options; the binary is the one mounted inside."""
    transport = SubprocessCLITransport(prompt="", options=options)
    transport._cli_path = INSIDE_CLAUDE  # noqa: SLF001  see the module's first paragraph
    return transport._build_command()  # noqa: SLF001


MAX_RETRIES = "2"


def environment(grants: ToolGrants, *, defers: bool = False, trace: str = "") -> dict[str, str]:
    """All that `claude` finds in its environment, beside PATH, HOME, LANG and TMPDIR.

    `defers` keeps it to streamed answers: in one that comes whole, several calls are one message,
    and it defers none of those. `trace` is for its spans, should the policy let it send any.
    """
    proxy = f"http://127.0.0.1:{INSIDE_PROXY_PORT}"
    return {
        "CLAUDE_CONFIG_DIR": CONFIG_DIR,
        "CLAUDE_CODE_PROJECT_DIR_NAME": PROJECT,
        "CLAUDE_CODE_TMPDIR": "/tmp",  # noqa: S108  the sandbox's own
        "ANTHROPIC_UNIX_SOCKET": INSIDE_EGRESS_SOCKET,
        "ANTHROPIC_BASE_URL": "http://model.internal",
        "ANTHROPIC_API_KEY": PLACEHOLDER,
        "CLAUDE_CODE_ENTRYPOINT": "sdk-py",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
        "CLAUDE_CODE_ENABLE_TASKS": "0",
        # egress repeats what can be repeated unseen (docs/decisions/0038); what is left is a stream
        # that broke off in the middle
        "CLAUDE_CODE_MAX_RETRIES": MAX_RETRIES,
        # a call in the background is over for its clock as soon as it has begun, and the turn,
        # which ends the run, does not wait for it
        "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
        "CLAUDE_CODE_SDK_READS_SESSION_STATE": "1",
        "CLAUDE_CODE_MAX_SUBAGENT_SPAWN_DEPTH": str(grants.max_subagent_depth),
        "CLAUDE_CODE_MAX_CONCURRENT_SUBAGENTS": str(grants.max_subagents),
        "CLAUDE_CODE_MAX_SUBAGENTS_PER_SESSION": str(PER_SESSION),
        "DISABLE_TELEMETRY": "1",
        "DISABLE_ERROR_REPORTING": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_BUG_COMMAND": "1",
        "TERM": "dumb",
        **({"CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1"} if defers else {}),
        **({"TRACEPARENT": trace} if trace else {}),
        **tool_environment(proxy),
    }


def tool_environment(proxy: str) -> dict[str, str]:
    """How programs inside find the way out and trust it. A hint for them, never a control."""
    names = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
    found = dict.fromkeys(names, proxy) | {name.lower(): proxy for name in names}
    trust = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "PIP_CERT")
    found |= dict.fromkeys((*trust, "NODE_EXTRA_CA_CERTS"), CA_BUNDLE)
    return found | {
        "NO_PROXY": "localhost,127.0.0.1,::1",
        "no_proxy": "localhost,127.0.0.1,::1",
        "NODE_USE_ENV_PROXY": "1",
        "GIT_TERMINAL_PROMPT": "0",
    }
