"""Whether a processor runs guests itself: what is believed, and in which order it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from ringfence.errors import UnavailableError
from ringfence.policy.compiled import SandboxProfile
from ringfence.sandbox import microvm_processor
from ringfence.sandbox.microvm import MicrovmBackend, refuse_emulation
from ringfence.sandbox.microvm_image import build
from ringfence.sandbox.microvm_processor import Processor, Processors, decide, device_problem
from ringfence.sandbox.microvm_profile import KVM, TRANSLATED

REAL = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu vme {flag} sse2\nbugs\t\t: vmx_no\n"


def never() -> NoReturn:
    raise AssertionError("a guest was booted although something before said no")


@pytest.mark.parametrize("flag", ["vmx", "svm"])
def test_kvm_counts_when_the_processor_can_and_a_guest_booted(flag: str) -> None:
    asked: list[str] = []

    def boot() -> str:
        asked.append("boot")
        return ""

    found = decide(REAL.format(flag=flag), None, boot)
    assert found == Processor(KVM)
    assert not found.emulated
    assert asked == ["boot"]


@pytest.mark.parametrize("flag", ["", "vmx_no", "notsvm", "hypervisor"])
def test_a_device_without_the_processors_flag_proves_nothing(flag: str) -> None:
    found = decide(REAL.format(flag=flag), None, never)
    assert found.emulated
    assert found.accelerator == TRANSLATED
    assert "neither vmx nor svm" in found.problem
    assert found.mend


def test_a_device_that_cannot_be_opened_is_not_tried() -> None:
    found = decide(REAL.format(flag="vmx"), ("/dev/kvm: gone", "modprobe it"), never)
    assert found.emulated
    assert (found.problem, found.mend) == ("/dev/kvm: gone", "modprobe it")


def test_a_guest_that_does_not_boot_in_time_means_emulation() -> None:
    found = decide(REAL.format(flag="svm"), None, lambda: "it took longer than 10 s")
    assert found.emulated
    assert "longer than 10 s" in found.problem
    assert found.mend


def test_who_must_be_able_to_open_the_device(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    assert "modprobe" in " ".join(device_problem(device, as_root=True) or ())
    device.touch()
    device.chmod(0o660)
    problem, mend = device_problem(device, as_root=True) or ("", "")
    assert "own uid" in problem
    assert "0666" in mend
    device.chmod(0o666)
    assert device_problem(device, as_root=True) is None
    assert device_problem(device, as_root=False) is None


def test_a_boot_that_worked_is_remembered_and_one_that_did_not_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["it hung", ""]
    asked = []

    async def boot(self: Processors) -> str:
        asked.append(self)
        return answers.pop(0)

    monkeypatch.setattr(Processors, "_boot", boot)
    monkeypatch.setattr(microvm_processor, "qemu_version", lambda: "QEMU 7.2")
    said = [Processors(tmp_path, range(3))._proved() for _ in range(3)]
    assert said == ["it hung", "", ""]
    assert len(asked) == 2
    monkeypatch.setattr(microvm_processor, "qemu_version", lambda: "QEMU 9.0")
    answers.append("another QEMU does not")
    assert Processors(tmp_path, range(3))._proved() == "another QEMU does not"


def test_emulation_is_refused_by_name_and_hardware_never() -> None:
    strict, lenient = SandboxProfile(), SandboxProfile(emulation=True)
    emulated = Processor(TRANSLATED, "no flag", "buy one")
    with pytest.raises(UnavailableError) as caught:
        refuse_emulation(emulated, strict)
    assert caught.value.code == "emulation-refused"
    assert "no flag" in caught.value.message
    assert "emulation: allow" in caught.value.hint
    assert "buy one" in caught.value.hint
    refuse_emulation(emulated, lenient)
    refuse_emulation(Processor(KVM), strict)


def test_a_host_without_qemu_is_never_taken_for_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = MicrovmBackend(state_dir=tmp_path)
    monkeypatch.setattr(Processors, "get", lambda _: Processor(KVM))

    def missing() -> NoReturn:
        raise UnavailableError("isolation-unavailable", "QEMU is missing")

    monkeypatch.setattr("ringfence.sandbox.microvm.check_tools", missing)
    assert backend.emulated
    monkeypatch.setattr("ringfence.sandbox.microvm.check_tools", lambda: "/virtiofsd")
    assert not backend.emulated


def test_what_guests_boot_lies_where_only_we_write(tmp_path: Path) -> None:
    place = tmp_path / "machines"
    place.mkdir(mode=0o700)
    place.chmod(0o770)
    with pytest.raises(UnavailableError) as caught:
        build(place)
    assert caught.value.code == "state-refused"
    assert list(place.iterdir()) == []
