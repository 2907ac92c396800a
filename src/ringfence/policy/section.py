"""The base of a policy document's sections, and those about the sandbox itself. PURE."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ringfence.policy.isolation import THREAT_MODELS, ThreatModel


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Execution(Section):
    """Time, memory and processes, each enforced from outside.

    Attributes:
        allow_network_tools, allow_subprocess: False takes such tools away whatever a role says;
            True adds them to the default tools; None leaves it to the role.
    """

    max_duration_seconds: Annotated[float, Field(gt=0, le=604_800, allow_inf_nan=False)] = 300.0
    max_tool_seconds: Annotated[float, Field(gt=0, le=604_800, allow_inf_nan=False)] = 120.0
    max_memory_mb: Annotated[int, Field(ge=64, le=16_777_216)] = 2048
    max_disk_mb: Annotated[int, Field(ge=1, le=16_777_216)] = 1024
    max_file_mb: Annotated[int, Field(ge=1, le=16_777_216)] = 1024
    cpus: Annotated[float, Field(ge=0.01, le=4096, allow_inf_nan=False)] = 2.0
    pids: Annotated[int, Field(ge=8, le=4_194_304)] = 512
    open_files: Annotated[int, Field(ge=64, le=1_048_576)] = 4096
    allow_network_tools: bool | None = None
    allow_subprocess: bool | None = None


class Audit(Section):
    """The record's share of one sandbox: past it, denials are counted and not listed (K)."""

    max_records: Annotated[int, Field(ge=100, le=10_000_000)] = 20_000


class Isolation(Section):
    """The technology by name; `auto`, the default under a `threat_model`, takes what fits that best
    of what this host can run, and nothing weaker. Without either it is bubblewrap.
    `engine` is what makes containers; `auto` takes the first found. For gvisor `podman` has podman
    call it.

    Attributes:
        emulation: whether a virtual machine may run on a processor emulated in software.
    """

    backend: Literal["auto", "bubblewrap", "runtime", "container", "gvisor", "microvm"] | None = (
        None
    )
    threat_model: ThreatModel | None = None
    engine: Literal["auto", "runc", "crun", "podman", "docker"] = "auto"
    emulation: Literal["allow", "deny"] = "deny"

    @model_validator(mode="after")
    def _auto_needs_a_threat_model(self) -> Isolation:
        if self.backend == "auto" and self.threat_model is None:
            raise ValueError(f"auto needs a threat_model: {', '.join(THREAT_MODELS)}")
        return self


class Hosting(Section):
    """How long a sandbox lives; read by services that host sessions, not by a single run."""

    pattern: Literal["ephemeral", "long-running", "hybrid", "multi-agent"] = "ephemeral"
