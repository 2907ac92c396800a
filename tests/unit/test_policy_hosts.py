"""Host names: one spelling each, nothing vague, and a matcher that cannot be talked round."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ringfence.policy.hosts import MODEL_HOST, host_problem, is_host, matches, normal_form, spelled

ODD = st.text(
    st.sampled_from(string.ascii_letters + string.digits + ".-*_%:@/[]\0 \tüß。"), max_size=24
)
LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
HOST = st.builds(".".join, st.lists(LABEL, min_size=1, max_size=3)).map(
    lambda h: f"{h}.example.com"
)


@pytest.mark.parametrize(
    "text",
    [
        "example.com",
        "a.b.example.co.uk",
        "*.example.com",
        "*.a.example.com",
        "xn--mnchen-3ya.de",
        "x1.internal",
    ],
)
def test_a_normal_host_is_taken(text: str) -> None:
    assert host_problem(text) is None
    assert normal_form(text) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("*", "match-all"),
        ("**", "match-all"),
        ("*.*", "match-all"),
        ("*.", "empty"),
        (".", "match-all"),
        ("*.com", "anybody"),
        ("*.co.uk", "anybody"),
        ("*.github.io", "anybody"),
        ("*.s3.amazonaws.com", "anybody"),
        ("*.internal", "anybody"),
        ("*.anthropic.com", MODEL_HOST),
        ("a.*.example.com", "first label"),
        ("a*.example.com", "first label"),
        ("*a.example.com", "first label"),
        ("*.*.example.com", "first label"),
        ("Example.com", "lower case: example.com"),
        ("example.com.", "trailing dot: example.com"),
        ("https://example.com/x", "alone, without scheme, user or path: example.com"),
        ("user@example.com", "without scheme, user"),
        ("example.com:443", "second port"),
        ("münchen.de", "punycode): xn--mnchen-3ya.de"),
        ("ex_ample.com", "underscore"),
        ("a%00.example.com", "percent"),
        ("a\0.example.com", "control"),
        ("a b.example.com", "blank"),
        ("evil.com\r\nx: y", "control"),
        ("1.2.3.4", "IP address"),
        ("127.1", "IP address"),
        ("0x7f.1", "IP address"),
        ("0x7f000001", "IP address"),
        ("017700000001", "IP address"),
        ("2130706433", "IP address"),
        ("169.254.169.254", "IP address"),
        ("1.2.3.0x4", "IP address"),
        ("[::1]", "address"),
        ("::ffff:1.2.3.4", "address"),
        ("localhost", "without a dot"),
        ("a.localhost", "stay on the host"),
        ("printer.local", "stay on the host"),
        ("-a.example.com", "labels"),
        ("a-.example.com", "labels"),
        ("a..example.com", "labels"),
        (".example.com", "labels"),
        ("a" * 64 + ".example.com", "labels"),
        ("a." * 127 + "example.com", "labels"),
        ("xn--99999999.example.com", "punycode"),
    ],
)
def test_a_vague_or_odd_host_is_refused_with_the_reason(text: str, words: str) -> None:
    problem = host_problem(text)
    assert problem is not None
    assert words in problem


def test_a_wildcard_stands_for_exactly_one_label() -> None:
    assert matches("*.example.com", "a.example.com")
    assert not matches("*.example.com", "a.b.example.com")
    assert not matches("*.example.com", "example.com")
    assert not matches("*.example.com", "evilexample.com")
    assert not matches("*.example.com", "a.example.com.evil.net")


def test_an_exact_name_matches_itself_alone() -> None:
    assert matches("example.com", "example.com")
    assert not matches("example.com", "a.example.com")
    assert not matches("example.com", "example.com.")
    assert not matches("example.com", "EXAMPLE.COM")


@pytest.mark.parametrize(
    "host",
    [
        "a\0.example.com",
        "a%2e.example.com",
        "a.example.com\n",
        "evil.com\0.example.com",
        "\uff41.example.com",
    ],
)
def test_a_name_that_is_not_normal_never_matches(host: str) -> None:
    assert not matches("*.example.com", host)


@given(ODD | st.text(max_size=24))
@example("*.Example.COM.")
@example("HTTPS://U:P@Example.com:8443/x?y#z")
def test_normal_form_is_idempotent_and_normal(text: str) -> None:
    form = normal_form(text)
    if form is not None:
        assert normal_form(form) == form
        assert host_problem(form) is None


@given(ODD | st.text(max_size=24), ODD | HOST | st.text(max_size=24))
def test_matching_is_total_and_only_normal_names_match(pattern: str, host: str) -> None:
    if matches(pattern, host):
        assert is_host(host)


@given(HOST)
def test_every_normal_host_is_taken_and_matches_itself_and_its_wildcard(host: str) -> None:
    if host_problem(host) is None:
        assert matches(host, host)
        assert matches("*." + host.partition(".")[2], host)


@pytest.mark.parametrize(
    ("name", "written"),
    [("münchen", "xn--mnchen-3ya"), ("straße", "xn--strae-oqa"), ("例え", "xn--r8jz45g")],
)
def test_an_encoded_label_is_read_and_shown(name: str, written: str) -> None:
    assert host_problem(f"{written}.example.com") is None
    assert spelled(f"a.{written}.example.com") == f"a.{written}.example.com (a.{name}.example.com)"
    assert spelled("a.example.com") == "a.example.com"


@pytest.mark.parametrize("name", ["MÜNCHEN", "mu\u0308nchen", "ﬁsché", "a\u200db", "pay\u2024pal", "a\u202eb"])  # fmt: skip
def test_an_encoded_label_has_one_spelling(name: str) -> None:
    """What a resolver would fold, drop or not show is another name than it seems."""
    label = "xn--" + name.encode("punycode").decode()
    assert host_problem(f"{label.lower()}.example.com") is not None
