"""The base from this host: what follows from dpkg's records, and what stays out."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.errors import CallerError
from ringfence.images import host

STATUS = """\
Package: base
Status: install ok installed
Essential: yes
Architecture: amd64
Version: 1
Pre-Depends: libc6 (>= 2.3), awk

Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9
Conffiles:
 /etc/ld.so.conf.d/x.conf 0123456789abcdef0123456789abcdef
 /etc/gone 0123456789abcdef0123456789abcdef obsolete
Description: x
 more

Package: mawk
Status: install ok installed
Architecture: amd64
Version: 1.3
Provides: awk (= 1)

Package: tool
Status: install ok installed
Architecture: amd64
Version: 3
Depends: absent | mawk:any (>= 1),
 other

Package: other
Status: install ok installed
Architecture: all
Version: 4

Package: half
Status: deinstall ok config-files
Architecture: all
Version: 4

Package: unneeded
Status: install ok installed
Architecture: all
Version: 4
"""


def test_a_closure_is_what_is_wanted_what_is_essential_and_their_needs() -> None:
    installed = host.read_status(STATUS)
    names = [each.name for each in host.closure(installed, ["tool"])]
    assert names == ["base", "libc6", "mawk", "other", "tool"]
    assert [each.name for each in host.closure(installed, [])] == ["base", "libc6", "mawk"]


def test_what_is_not_installed_is_named_with_the_mend() -> None:
    with pytest.raises(CallerError, match="not installed on this host: half, nothing") as caught:
        host.closure(host.read_status(STATUS), ["tool", "nothing", "half"])
    assert caught.value.code == "image-invalid"
    assert "apt-get install half nothing" in caught.value.hint


def test_records_are_read_as_dpkg_writes_them() -> None:
    libc = host.read_status(STATUS)["libc6"]
    assert dict(libc.conffiles) == {"/etc/ld.so.conf.d/x.conf": "0123456789abcdef" * 2}
    assert dict(host.read_status_versions(STATUS))["libc6"] == "2.36-9"
    assert "half" not in dict(host.read_status_versions(STATUS))


def test_a_file_of_etc_goes_in_only_as_it_was_shipped(tmp_path: Path) -> None:
    file = tmp_path / "conf"
    file.write_text("hello")
    assert host._as_shipped(file, "5d41402abc4b2a76b9719d911017c592")
    file.write_text("hello, and a password")
    assert not host._as_shipped(file, "5d41402abc4b2a76b9719d911017c592")
    assert not host._as_shipped(file, None)
    assert not host._as_shipped(tmp_path / "none", "5d41402abc4b2a76b9719d911017c592")
    (tmp_path / "link").symlink_to("conf")
    assert host._as_shipped(tmp_path / "link", None)
    assert not host._as_shipped(tmp_path / "link", "5d41402abc4b2a76b9719d911017c592")
