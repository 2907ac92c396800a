"""The first program of a gVisor sandbox: does what only gVisor's own root may, and is it no more.
PURE.

It is trusted with that alone: it runs in the sandbox, and what stands outside holds whatever it
does. A step that fails, or that a look afterwards does not find done, ends it with 125.

The count of tasks is gVisor's own and has no other door: past it fork fails there, long before
what counts outside would end the sentry and all with it. Our filter is set here too: runsc's own
way to one answers EPERM where a libc waits for ENOSYS, and claude cannot make a thread.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

from ringfence.sandbox import seccomp
from ringfence.sandbox.protocol import INSIDE_UID

GATE = 3
"""Its descriptor of a pipe in which a byte comes once all that is outside has been read back."""
CAPABILITIES = ("CAP_SETUID", "CAP_SETGID")
CAPABILITIES_OF_ONE_ID = ("CAP_CHOWN", "CAP_SYS_ADMIN")
"""What it begins with, over gVisor's kernel and nothing of the host."""

PERL = "/usr/bin/perl"
_CALLS = {"x86_64": (157, 272, 165), "aarch64": (167, 97, 40)}
"""Numbers of prctl, unshare and mount."""

_COUNT = """
my ($tasks, $filter, $count) = splice(@ARGV, 0, 3);
my @environment = splice(@ARGV, 0, $count);
sub fail { print STDERR "in gVisor: $_[0]: $!\\n"; exit 125 }
sub put { open(F, ">", $_[0]) && syswrite(F, $_[1]) && close(F) or fail($_[0]) }
open(GATE, "<&=", FD) && sysread(GATE, my $go, 1) && close(GATE) or fail("gate");
put("/sys/fs/cgroup/pids/pids.max", $tasks);
"""

_OF_A_BLOCK = """
$( = UID; $) = "UID UID"; $< = UID; $> = UID;
"""

_OF_ONE_ID = """
opendir(D, "/dev") or fail("/dev");
my @devices = ("/dev", grep { -c && !-l } map { "/dev/$_" } readdir(D));
chown(NOBODY, NOBODY, @devices) == @devices or fail("/dev");
my $none = "none";
for my $place ("/proc/sys", "/proc/sysrq-trigger", "/sys") {
  my $path = $place;
  syscall(MOUNT, $path, $path, $none, 4096, 0) == 0 or fail($place);
  syscall(MOUNT, $none, $path, $none, 4129, 0) == 0 or fail($place);
}
syscall(UNSHARE, 0x10000000) == 0 or fail("unshare");
put("/proc/self/gid_map", "UID 0 1");
put("/proc/self/uid_map", "UID 0 1");
for my $capability (0 .. 63) {
  syscall(PRCTL, 24, $capability, 0, 0, 0);
  fail("capabilities") if syscall(PRCTL, 23, $capability, 0, 0, 0) == 1;
}
for my $shut ("/proc/sys/kernel/yama/ptrace_scope", "/proc/sysrq-trigger", "/dev/.shut") {
  fail($shut) if open(F, ">>", $shut);
}
fail("control groups") if -e "/sys/fs/cgroup/pids";
"""
"""An ordinary user has one id, and gVisor's gofer knows the files of none but that: it is root's
inside. So what is the agent's is root's too, and a user namespace of gVisor's calls that one
UID, as everywhere. But what is root's of the system is the agent's then: it is taken away or made
read-only before, gVisor's yama among it, which keeps the memory of claude from its tools."""

_PROGRAM = """
"$< $> $( $)" =~ /^UID UID UID( UID)* UID( UID)*$/ or fail("ids");
$filter = pack("H*", $filter);
my $program = pack("S x6 P", length($filter) / 8, $filter);
syscall(PRCTL, 38, 1, 0, 0, 0) == 0 or fail("no_new_privs");
syscall(PRCTL, 22, 2, $program, 0, 0) == 0 or fail("seccomp");
%ENV = map { split(/=/, $_, 2) } @environment;
exec {$ARGV[0]} @ARGV;
my $missing = $! == 2;
print STDERR "$ARGV[0]: $!\\n";
exit($missing ? 127 : 126);
"""


def first(
    argv: Sequence[str], environment: Mapping[str, str], tasks: int, *, one_id: bool
) -> list[str]:
    """The words that become `argv`, with no more than `tasks` tasks; `one_id` as in `oci`.

    The program's environment is among them and not ours: LD_PRELOAD or PERL5OPT would have the
    workspace's files run as gVisor's root.
    """
    machine = platform.machine()
    script = _COUNT + (_OF_ONE_ID if one_id else _OF_A_BLOCK) + _PROGRAM
    names = ("PRCTL", "UNSHARE", "MOUNT", "UID", "NOBODY", "FD")
    for name, value in zip(names, (*_CALLS[machine], INSIDE_UID, 65534, GATE), strict=True):
        script = script.replace(name, str(value))
    given = [str(len(environment)), *(f"{name}={value}" for name, value in environment.items())]
    # its count lets some more through than it is told, 71 for 64: the policy's is a ceiling
    return [PERL, "-e", script, str(tasks * 3 // 4), seccomp.build(machine).hex(), *given, *argv]
