"""Pure parts of the record: frames, quota, safe text, transcripts, usage."""

from __future__ import annotations

import json
import unicodedata
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.agent.messages import Notice, ToolStarted
from ringfence.cli.live import LiveView
from ringfence.errors import DeniedError
from ringfence.record.quota import NEVER_COUNTED, Quota, Verdict
from ringfence.record.safe_text import one_line, printable
from ringfence.record.transcript import (
    check_subpath,
    encode_entry,
    files_of,
    first_prompt,
    forked,
    tool_use_ids,
)
from ringfence.record.usage import requests, total
from ringfence.record.wire import MAX_FRAME, Decoder, FrameError, encode

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=8), json_values, max_size=4)


# frames


@given(st.lists(objects, max_size=5), st.integers(1, 40))
def test_frames_survive_any_cut(values: list[dict[str, object]], step: int) -> None:
    data = b"".join(encode(value) for value in values)
    decoder, found = Decoder(), []
    for at in range(0, len(data), step):
        found += decoder.feed(data[at : at + step])
    assert found == values


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_any_bytes_are_values_or_one_error(chunks: list[bytes]) -> None:
    decoder = Decoder()
    try:
        for chunk in chunks:
            assert all(isinstance(value, dict) for value in decoder.feed(chunk))
    except FrameError:
        pass


@pytest.mark.parametrize(
    "data",
    [
        (MAX_FRAME + 1).to_bytes(4, "big"),
        b"\0\0\0\2[]",
        b"\0\0\0\1{",
        (20_000).to_bytes(4, "big") + b"[" * 20_000,
        (6000).to_bytes(4, "big") + b"1" * 6000,
    ],
)
def test_bad_frames_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        Decoder().feed(data)


# quota (requirement K)


def denial(sandbox: str, reason: str = "host-not-allowed") -> dict[str, object]:
    return {"type": "egress.refused", "sandbox_id": sandbox, "reason": reason, "target": "x"}


def test_denials_past_the_share_are_counted_and_everyone_else_goes_on() -> None:
    quota = Quota(10)
    verdicts = [quota.judge(denial("a")) for _ in range(25)]
    assert verdicts == [Verdict.WRITE] * 10 + [Verdict.COUNT] * 15
    assert quota.judge(denial("b")) is Verdict.WRITE
    (held,) = quota.flush()
    assert (held["count"], held["sandbox_id"], held["source"]) == (15, "a", "recorder")
    assert quota.flush() == []


@pytest.mark.parametrize("kind", sorted(NEVER_COUNTED))
def test_what_explains_a_run_is_never_dropped(kind: str) -> None:
    quota = Quota(1)
    for _ in range(50):
        assert quota.judge({"type": kind, "sandbox_id": "a"}) is Verdict.WRITE


def test_a_flood_of_doings_is_refused_and_stops_only_its_own_sandbox() -> None:
    quota = Quota(2)
    allowed = {"type": "egress.allowed", "sandbox_id": "a"}
    assert [quota.judge(allowed) for _ in range(20)] == [Verdict.WRITE] * 20
    assert quota.judge(allowed) is Verdict.REFUSE
    assert quota.judge({**allowed, "sandbox_id": "b"}) is Verdict.WRITE
    assert quota.judge(denial("a")) is Verdict.COUNT


def test_decisions_are_not_free_of_charge() -> None:
    """A forger of hook frames must not fill the log; an undecided call does not run."""
    quota = Quota(2)
    decided = {"type": "tool.decided", "sandbox_id": "a"}
    assert [quota.judge(decided) for _ in range(20)] == [Verdict.WRITE] * 20
    assert quota.judge(decided) is Verdict.REFUSE
    assert quota.judge({**decided, "sandbox_id": "b"}) is Verdict.WRITE


def test_a_policy_may_give_another_share() -> None:
    quota = Quota(1)
    quota.allow("a", 3)
    for bad in (0, -1, True, "9", None):
        quota.allow("a", bad)
    assert [quota.judge(denial("a")) for _ in range(4)] == [Verdict.WRITE] * 3 + [Verdict.COUNT]


def test_invented_reasons_do_not_grow_memory() -> None:
    quota = Quota(1)
    quota.judge(denial("a"))
    for number in range(10_000):
        quota.judge(denial("a", f"reason-{number}"))
    held = quota.flush()
    assert len(held) < 5000
    assert sum(record["count"] for record in held) == 10_000


# safe text (requirement K)

HOSTILE = {
    "clear screen": ("a\x1b[2Jb", "ab"),
    "colour": ("\x1b[31mred\x1b[0m", "red"),
    "window title": ("a\x1b]0;owned\x07b", "ab"),
    "hyperlink": ("\x1b]8;;http://x\x1b\\click\x1b]8;;\x1b\\", "click"),
    "device attributes": ("\x1b[c", ""),
    "8-bit CSI": ("a\x9b2Jb", "ab"),
    "DCS": ('a\x1bP$q"p\x1b\\b', "ab"),
    "unfinished": ("a\x1b", "a"),
    "carriage return": ("good\rbad", "goodbad"),
    "backspace": ("rm\b\bls", "rmls"),
    "bell": ("\x07", ""),
    "bidi": ("a\u202eb\u2066c\u2069", "abc"),
    "line separator": ("a\u2028b", "ab"),
    "zero width": ("a\u200bb\ufeff", "ab"),
    "tags": ("a\U000e0041\U000e007f", "a"),
    "surrogate": ("a\ud800", "a\ufffd"),
    "an unfinished title does not eat the next line": ("\x1b]0;x\nnext", "\nnext"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_controls_are_stripped(name: str) -> None:
    text, expected = HOSTILE[name]
    assert printable(text) == expected


@pytest.mark.parametrize(
    "text", ["plain", "déjà vu", "日本語", "a\tb\nc", "👩‍👩‍👧", "שלום", "(x) [y]"]
)
def test_ordinary_text_stays(text: str) -> None:
    assert printable(text) == text


@given(
    st.text(alphabet=st.characters(), max_size=80)
    | st.binary(max_size=80).map(lambda b: b.decode("latin-1"))
)
def test_nothing_that_acts_is_left(text: str) -> None:
    out = printable(text)
    assert printable(out) == out
    for character in out:
        if character not in "\n\t":
            assert unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"}
            assert unicodedata.bidirectional(character) not in {
                "LRE",
                "RLE",
                "LRO",
                "RLO",
                "PDF",
                "LRI",
                "RLI",
                "FSI",
                "PDI",
            }
    assert len(one_line(text).splitlines()) <= 1


def test_one_value_cannot_pose_as_a_line() -> None:
    assert one_line("a\n12 good") == "a⏎12 good"
    assert one_line("x" * 50, 10) == "x" * 9 + "…"


# transcripts (requirement H)


@pytest.mark.parametrize(
    "subpath",
    ["..", "../x", "a/../b", "/etc/passwd", "a//b", "a/", "", ".hidden", "a/.x", "a\\b", "a\0b", "C:x", "a b",
     "a\n", "a/b/c/d/e/f/g/h/i", "x" * 129, "-x", "a/..b"],
)  # fmt: skip
def test_bad_subpaths_are_refused(subpath: str) -> None:
    with pytest.raises(DeniedError) as caught:
        check_subpath(subpath)
    assert caught.value.code == "session-frame-refused"


@pytest.mark.parametrize("subpath", ["subagents/agent-ad2655891f5fe3426", "a", "a/b-c/d_e.f"])
def test_the_subpaths_of_claude_pass(subpath: str) -> None:
    assert check_subpath(subpath) == subpath


@given(st.text(max_size=30))
def test_a_subpath_that_passes_stays_below(subpath: str) -> None:
    try:
        check_subpath(subpath)
    except DeniedError:
        return
    assert all(part not in {"", ".", ".."} for part in subpath.split("/"))
    assert subpath.isascii()


@given(objects)
def test_an_entry_is_one_line_and_comes_back(entry: dict[str, object]) -> None:
    line = encode_entry(entry)
    assert line.isascii()
    assert "\n" not in line
    assert json.loads(line) == entry


def deep() -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(100_000):
        value = {"a": value}
    return value


def test_entries_that_are_none_are_refused() -> None:
    for bad in ("text", {"a": float("nan")}, {"a": object()}, {"a": "x" * (9 << 20)}, deep()):
        with pytest.raises(DeniedError):
            encode_entry(bad)  # type: ignore[arg-type]


def test_the_sidecar_of_a_subagent() -> None:
    entries = [
        {"type": "agent_metadata", "agentType": "x"},
        {"type": "user", "n": 1},
        {"type": "agent_metadata", "agentType": "x", "finished": True},
    ]
    lines = [encode_entry(entry) for entry in entries]
    files = files_of("home/sid", "subagents/agent-1", lines)
    assert files == {
        "home/sid/subagents/agent-1.jsonl": b'{"type":"user","n":1}\n',
        "home/sid/subagents/agent-1.meta.json": b'{"agentType":"x","finished":true}',
    }
    assert files_of("home/sid", "", lines[:1]) == {
        "home/sid.jsonl": b'{"type":"agent_metadata","agentType":"x"}\n'
    }
    with pytest.raises(DeniedError):
        files_of("home/sid", "../x", lines)


def _row(kind: str, uuid: str, **more: object) -> str:
    return encode_entry({"type": kind, "uuid": uuid, **more})


def _pointer(leaf: object) -> str:
    return encode_entry({"type": "last-prompt", "lastPrompt": "hi", "leafUuid": leaf})


def _put_before_claude(*lines: str, subpath: str = "") -> list[str]:
    (content,) = files_of("home/sid", subpath, lines).values()
    return content.decode().splitlines()


def test_a_pointer_to_where_a_conversation_stood_once_is_left_out() -> None:
    asked, call = _row("user", "u1"), _row("assistant", "a1")
    waits, result = _row("attachment", "x1"), _row("user", "u2", parentUuid="a1")
    old = _pointer("x1")
    assert _put_before_claude(asked, call, waits, old) == [asked, call, waits, old]
    assert _put_before_claude(asked, call, waits, old, result) == [asked, call, waits, result]
    # written again when the process ended, without having moved
    assert _put_before_claude(asked, call, waits, result, old) == [asked, call, waits, result]
    # and one that came after both, at the last words or behind them
    for new in (_pointer("u2"), _pointer("x2")):
        lines = (asked, call, waits, old, result, _row("attachment", "x2"), new)
        assert _put_before_claude(*lines) == [line for line in lines if line != old]


def test_what_moves_no_conversation_outdates_no_pointer() -> None:
    lines = [_row("assistant", "a1"), _pointer("a1"), _row("user", "s1", isSidechain=True)]
    lines += [encode_entry({"type": "ringfence-begun", "tool_use_id": "toolu_1"})]
    assert _put_before_claude(*lines) == lines
    spoken = [_row("user", "u1", message={"content": _pointer("a0")}), _pointer(7), _pointer([])]
    assert _put_before_claude(*spoken) == spoken, "words of this form, and no pointers"
    beside = [_pointer("a0"), _row("user", "u1")]
    assert _put_before_claude(*beside, subpath="subagents/agent-1") == beside


def test_a_fork_renames_everything_and_shares_nothing() -> None:
    old, new = str(uuid.uuid4()), str(uuid.uuid4())
    one, two = str(uuid.uuid4()), str(uuid.uuid4())
    streams = {
        "": [
            {"type": "user", "uuid": one, "parentUuid": None, "sessionId": old, "slug": "s"},
            {
                "type": "assistant",
                "uuid": two,
                "parentUuid": one,
                "sessionId": old,
                "x": [{"leaf": one}],
            },
            {"type": "last-prompt", "sessionId": old, "leafUuid": two},
        ],
        "subagents/agent-1": [{"type": "user", "uuid": one, "sessionId": old}],
    }
    before = json.dumps(streams)
    out = forked(streams, old, new, lambda: str(uuid.uuid4()))
    assert json.dumps(streams) == before
    main = out[""]
    assert [entry["sessionId"] for entry in main] == [new] * 3
    assert main[1]["parentUuid"] == main[0]["uuid"] == main[1]["x"][0]["leaf"] != one
    assert main[2]["leafUuid"] == main[1]["uuid"]
    assert main[0]["forkedFrom"] == {"sessionId": old, "messageUuid": one}
    assert "slug" not in main[0]
    assert out["subagents/agent-1"][0]["uuid"] == main[0]["uuid"]


def test_tool_uses_and_first_prompt_of_hostile_entries() -> None:
    entries = [
        {"type": "user", "isMeta": True, "message": {"content": "meta"}},
        {"type": "user", "message": None},
        {"type": "user", "message": {"content": 7}},
        {"type": "user", "message": {"content": [{"type": "text"}, {"type": "text", "text": "hi"}]}},
        {"type": "assistant", "message": {"content": [{"type": "tool_use", "id": "toolu_1"}, {"type": "tool_use"}, 3]}},
        {"type": "assistant", "message": {"content": [{"type": "tool_use", "id": ["x"]}]}},
    ]  # fmt: skip
    assert list(tool_use_ids(entries)) == ["toolu_1"]
    assert first_prompt(entries) == "hi"
    assert first_prompt([]) == ""


# usage


def test_usage_is_the_sum_and_an_unknown_price_stays_unknown() -> None:
    answered = {"type": "model.answered", "run_id": "r", "request_id": "q", "model": "m", "status": 200,
                "input_tokens": 3, "output_tokens": 2, "cost_usd": 0.25}  # fmt: skip
    counting = {**answered, "billed": False, "input_tokens": 0, "output_tokens": 0, "cost_usd": 0.0}
    assert total(requests([answered, {"type": "run.ended"}, answered])).cost_usd == 0.5
    assert total(requests([answered, answered, counting])).input_tokens == 6
    assert total(requests([answered, answered, counting])).requests == 2
    assert total(requests([answered, {**answered, "cost_usd": None}])).cost_usd is None
    assert requests([answered])[0].usage.requests == 1
    assert total([]).requests == 0


def test_what_an_agent_names_is_one_line_in_the_live_view(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = LiveView(command=False)
    line = "x\n✓ all tests pass\x1b[2J\u202e"
    view.show(Notice(kind="egress_denied", text=line))
    view.show(
        ToolStarted(tool_use_id="t", name=line, input={"command": line}, allowed=False, reason=line)
    )
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2
    assert not {"\x1b", "\u202e"} & set(err)
