"""Environments in the public shapes, and our block beside them. PURE.

Public: `config`, of type `cloud`. Ours: `ringfence`, which says where and under what limits runs
go. Two defaults are narrower than the service's, on purpose: without `networking` nothing but the
model is reached, and `unrestricted` must be asked for by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, StringConstraints, model_validator

from ringfence.config.slo import Share, a_bound
from ringfence.control.shapes import (
    Description,
    Host,
    Metadata,
    MetadataPatch,
    Name,
    Shape,
    Ways,
    patched,
    unsupported,
)
from ringfence.control.urgency import Urgency
from ringfence.policy.isolation import ThreatModel

# A leading hyphen would be an option of the package manager, a blank a second argument.
Package = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9@][A-Za-z0-9@._/+:=<>~!\[\],^-]{0,213}$")
]
PackageList = Annotated[list[Package], Field(max_length=100)]
MANAGERS = ("apt", "cargo", "gem", "go", "npm", "pip")
Path = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
PathList = Annotated[list[Path], Field(max_length=100)]


class Unrestricted(Shape):
    """Every host that the operator's policy names, where the operator has settled that."""

    type: Literal["unrestricted"]


class Limited(Shape):
    """The hosts that are named, and nothing else."""

    type: Literal["limited"]
    allowed_hosts: Annotated[list[Host], Field(max_length=200)] | None = None
    allow_mcp_servers: bool | None = None
    allow_package_managers: bool | None = None


Networking = Annotated[Unrestricted | Limited, Discriminator("type")]


class Packages(Shape):
    """What is to be installed, by package manager: nothing, see `EnvironmentDefinition`."""

    type: Literal["packages"] | None = None
    apt: PackageList | None = None
    cargo: PackageList | None = None
    gem: PackageList | None = None
    go: PackageList | None = None
    npm: PackageList | None = None
    pip: PackageList | None = None


class CloudConfig(Shape):
    """Network and packages."""

    type: Literal["cloud"]
    networking: Networking | None = None
    packages: Packages | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_cloud(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") == "self_hosted":
            raise unsupported("an environment of type `self_hosted` (every one is yours already)")
        return value


class FilesystemBlock(Shape):
    """Files, each line at most as wide as the operator's."""

    workspace: Literal["review", "direct", "readonly"] | None = None
    readable_paths: PathList | None = None
    writable_paths: PathList | None = None
    blocked_paths: PathList | None = None
    hidden: PathList | None = None
    tmp_exec: Literal[False] | None = None
    exec_in_workspace: Literal[False] | None = None


class ExecutionBlock(Shape):
    """Limits, each at most the operator's."""

    max_duration_seconds: Annotated[float, Field(gt=0, le=604_800)] | None = None
    max_tool_seconds: Annotated[float, Field(gt=0, le=604_800)] | None = None
    max_memory_mb: Annotated[int, Field(ge=64, le=16_777_216)] | None = None
    max_disk_mb: Annotated[int, Field(ge=1, le=16_777_216)] | None = None
    max_file_mb: Annotated[int, Field(ge=1, le=16_777_216)] | None = None
    cpus: Annotated[float, Field(ge=0.01, le=4096)] | None = None
    pids: Annotated[int, Field(ge=8, le=4_194_304)] | None = None
    open_files: Annotated[int, Field(ge=64, le=1_048_576)] | None = None
    allow_network_tools: Literal[False] | None = None
    allow_subprocess: Literal[False] | None = None


class LatencyBlock(Shape):
    """That a share of interactive runs end in time."""

    share: Share
    seconds: Annotated[float, AfterValidator(a_bound)]


class SloBlock(Shape):
    """What is promised of the environment's runs, at most what the operator promises of all."""

    success: Share | None = None
    latency: LatencyBlock | None = None


class RingfenceBlock(Shape):
    """Ours: where runs go. What is left out is the operator's."""

    isolation: Literal["auto", "bubblewrap", "runtime", "container", "gvisor", "microvm"] | None = (
        None
    )
    threat_model: ThreatModel | None = None
    hosting: Literal["ephemeral", "long_running", "hybrid", "multi_agent"] | None = None
    idle_seconds: Annotated[float, Field(gt=0, le=604_800)] | None = None
    max_agents: Annotated[int, Field(ge=2, le=16)] | None = None
    filesystem: FilesystemBlock | None = None
    execution: ExecutionBlock | None = None
    approval_seconds: Annotated[float, Field(ge=1, le=2_592_000)] | None = None
    priority: Urgency | None = None
    slo: SloBlock | None = None
    failover: Ways | None = None

    @model_validator(mode="after")
    def _lines_of_patterns(self) -> RingfenceBlock:
        stays = ("long_running", "multi_agent")
        if self.idle_seconds is not None and self.hosting not in stays:
            raise ValueError("idle_seconds belongs to hosting long_running and multi_agent")
        if self.max_agents is not None and self.hosting != "multi_agent":
            raise ValueError("max_agents belongs to hosting multi_agent")
        return self

    @property
    def agents(self) -> int:
        """How many sessions share a sandbox; 1 where none do."""
        return (self.max_agents or 4) if self.hosting == "multi_agent" else 1


class EnvironmentDefinition(Shape):
    """What an environment is; the body of its creation."""

    name: Name
    config: CloudConfig | None = None
    description: Description | None = None
    metadata: Metadata = Field(default_factory=dict)
    scope: Literal["organization"] | None = None
    ringfence: RingfenceBlock | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_scope(cls, value: Any) -> Any:
        return _refuse_account(value)

    @model_validator(mode="after")
    def _no_packages(self) -> EnvironmentDefinition:
        packages = self.config.packages if self.config else None
        named = [one for one in MANAGERS if packages is not None and getattr(packages, one)]
        if named:
            raise unsupported(
                f"config.packages.{named[0]} (the operator's image has packages, and an agent "
                "installs its own where networking.allow_package_managers leads to a registry)"
            )
        return self


class EnvironmentPatch(Shape):
    """The body of an update: what is left out stays."""

    name: Name | None = None
    config: CloudConfig | None = None
    description: Description | None = None
    metadata: MetadataPatch = Field(default_factory=dict)
    scope: Literal["organization"] | None = None
    ringfence: RingfenceBlock | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_scope(cls, value: Any) -> Any:
        return _refuse_account(value)


def _refuse_account(value: Any) -> Any:
    if isinstance(value, dict) and value.get("scope") == "account":
        raise unsupported("scope `account`")
    return value


def resolved(environment: EnvironmentDefinition) -> dict[str, Any]:
    """A definition with every default written out. A fixed point."""
    config = environment.config or CloudConfig(type="cloud")
    block = environment.ringfence
    return {
        "name": environment.name,
        "description": environment.description,
        "config": {
            "type": "cloud",
            "networking": _networking(config.networking),
            "packages": {
                "type": "packages",
                **{
                    manager: list(getattr(config.packages, manager, None) or ())
                    for manager in MANAGERS
                },
            },
        },
        "metadata": dict(environment.metadata),
        "scope": "organization",
        "ringfence": block.model_dump(mode="json", exclude_none=True) if block else {},
    }


def _networking(networking: Unrestricted | Limited | None) -> dict[str, Any]:
    if isinstance(networking, Unrestricted):
        return {"type": "unrestricted"}
    limited = networking or Limited(type="limited")
    return {
        "type": "limited",
        "allowed_hosts": list(dict.fromkeys(limited.allowed_hosts or ())),
        "allow_mcp_servers": bool(limited.allow_mcp_servers),
        "allow_package_managers": bool(limited.allow_package_managers),
    }


def merged(stored: dict[str, Any], patch: EnvironmentPatch) -> dict[str, Any]:
    """The definition after an update, to be validated as a whole. `stored` is resolved.

    As the client's types say: fields of `config` that are left out or null stay; an empty string
    deletes a key of the metadata; `description` is cleared by null. Ours: the block `ringfence`
    is replaced whole, because a limit that stays behind unseen is worse than one said twice.
    """
    given = patch.model_fields_set
    found = dict(stored)
    if patch.name is not None:
        found["name"] = patch.name
    if "description" in given:
        found["description"] = patch.description
    if "ringfence" in given:
        block = patch.ringfence
        found["ringfence"] = block.model_dump(mode="json", exclude_none=True) if block else {}
    if patch.config is not None:
        found["config"] = _config(stored["config"], patch.config)
    changes = {key: value or None for key, value in patch.metadata.items()}
    found["metadata"] = patched(stored["metadata"], changes)
    return found


def _config(stored: dict[str, Any], config: CloudConfig) -> dict[str, Any]:
    found = dict(stored)
    for name in ("networking", "packages"):
        part = getattr(config, name)
        if part is None:
            continue
        stated = part.model_dump(mode="json", exclude_none=True)
        same_kind = stored[name].get("type") == (stated.get("type") or "packages")
        found[name] = {**(stored[name] if same_kind else {}), **stated}
    return found
