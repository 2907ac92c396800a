"""Findings for machines and people: SARIF 2.1.0 and one self-contained page of HTML. PURE.

Evidence may be the words of a program inside a sandbox: in HTML everything is escaped, there is
no script, and the page forbids itself any (Content-Security-Policy).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ringfence.check.finding import Finding, Line, Outcome, Severity
from ringfence.check.report import Result
from ringfence.record.safe_text import one_line

_LEVELS = {
    Severity.CRITICAL: "error",
    Severity.HIGH: "error",
    Severity.MEDIUM: "warning",
    Severity.LOW: "note",
}
_KINDS = {
    Outcome.PASS: "pass",
    Outcome.FAIL: "fail",
    Outcome.NOT_AVAILABLE: "notApplicable",
    Outcome.ERROR: "open",
}
_SECURITY = {
    Severity.CRITICAL: "9.5",
    Severity.HIGH: "8.0",
    Severity.MEDIUM: "5.5",
    Severity.LOW: "3.0",
}


def sarif(result: Result) -> dict[str, Any]:
    """A SARIF 2.1.0 log: one rule a check, one result a finding; what passed is in it, too."""
    checks = {finding.check.id: finding.check for finding in result.findings}
    document = result.to_json()
    rules = [
        {
            "id": check.id,
            "shortDescription": {"text": check.title},
            "fullDescription": {"text": check.expect or check.title},
            "help": {"text": check.mend or check.title},
            "properties": {
                # SARIF 3.8.2: each tag once, and a layer may be called as its line is
                "tags": list(
                    dict.fromkeys(("security", check.kind.value, check.line.value, check.layer))
                ),
                "security-severity": _SECURITY[check.severity],
                "precedent": check.source,
            },
            "defaultConfiguration": {"level": _LEVELS[check.severity]},
        }
        for check in checks.values()
    ]
    index = {name: number for number, name in enumerate(checks)}
    driver = {
        "name": "ringfence check",
        "semanticVersion": document["versions"]["ringfence"],
        "rules": rules,
    }
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "invocations": [
                    {
                        "executionSuccessful": True,
                        "exitCode": result.status,
                        "startTimeUtc": result.time,
                    }
                ],
                "properties": {key: document[key] for key in ("host", "policy", "isolations")},
                "results": [_sarif_result(finding, index) for finding in result.findings],
            }
        ],
    }


def _sarif_result(finding: Finding, index: Mapping[str, int]) -> dict[str, Any]:
    check = finding.check
    place = finding.isolation or "host"
    text = f"{check.title}: {finding.outcome.value}. {one_line(finding.evidence)}".strip()
    return {
        "ruleId": check.id,
        "ruleIndex": index[check.id],
        "kind": _KINDS[finding.outcome],
        # SARIF 3.27.10: a level other than none only where the kind is fail
        "level": _LEVELS[check.severity] if finding.outcome is Outcome.FAIL else "none",
        "message": {"text": text},
        "locations": [
            {"logicalLocations": [{"fullyQualifiedName": f"{place}/{check.layer}"}]},
        ],
        "partialFingerprints": {"check/v1": f"{place}/{check.id}"},
    }


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;
color:#1b1b1b;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;
padding:.3rem .6rem;border-bottom:1px solid #ddd}
td.e{font-family:ui-monospace,monospace;font-size:.85em;overflow-wrap:anywhere}
.pass{color:#0a6b2d}.fail{color:#b00020;font-weight:700}.error{color:#8a5a00;font-weight:700}
.not{color:#666}small{color:#666}
@media(prefers-color-scheme:dark){body{color:#eee;background:#161616}th,td{border-color:#444}
.pass{color:#5fd38a}.fail{color:#ff7b8a}.error{color:#ffc861}.not,small{color:#aaa}}
"""


def html(result: Result) -> str:
    """One page without scripts, fonts or pictures; printable, and readable in mail."""
    document = result.to_json()
    counts = "; ".join(
        f"{kind}: " + ", ".join(f"{number} {name}" for name, number in numbers.items())
        for kind, numbers in document["outcomes_by_kind"].items()
    )
    host = document["host"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width">',
        f"<title>ringfence check: {_text(host['name'])}</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>ringfence check: {_text(host['name'])}</h1>",
        f"<p>{_text(counts)}. {_text(result.time)}, {result.seconds:.1f} s, "
        f"{_text(host['distribution'])}, kernel {_text(host['kernel'])}.<br>"
        f"<small>policy {_text(result.policy_source)} {_text(result.policy)}</small></p>",
        _matrix_html(result),
    ]
    for line in Line:
        rows = [finding for finding in result.findings if finding.check.line is line]
        if rows:
            parts.append(f"<h2>{_text(line.value.capitalize())}</h2>{_rows_html(rows)}")
    return "".join([*parts, "</body></html>\n"])


def _text(value: object) -> str:
    return escape(one_line(str(value)), quote=True)


def _class(outcome: Outcome) -> str:
    return outcome.value.split()[0]


def _rows_html(findings: Sequence[Finding]) -> str:
    rows = []
    for finding in sorted(findings, key=lambda f: f.outcome is Outcome.PASS):
        check = finding.check
        mend = f"<br><small>{_text(check.mend)}</small>" if finding.outcome is Outcome.FAIL else ""
        rows.append(
            f'<tr><td class="{_class(finding.outcome)}">{_text(finding.outcome.value)}</td>'
            f"<td>{_text(check.id)}</td><td>{_text(check.kind.value)}</td>"
            f"<td>{_text(finding.isolation or 'host')}</td>"
            f"<td>{_text(check.title)}{mend}</td><td>{_text(check.severity.value)}</td>"
            f'<td class="e">{_text(finding.evidence)}</td></tr>'
        )
    head = "".join(f"<th>{name}</th>" for name in _HEAD)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


_HEAD = ("outcome", "id", "kind", "where", "check", "severity", "evidence")


def layers(findings: Iterable[Finding]) -> tuple[str, ...]:
    """Columns of the matrix: layers that were attacked, as they are first met."""
    return tuple(dict.fromkeys(f.check.layer for f in findings if f.isolation))


def cell(findings: Iterable[Finding], isolation: str, layer: str) -> tuple[Outcome, str]:
    """One cell of technology by layer: the worst outcome, and how many passed of how many asked."""
    there = [f for f in findings if f.isolation == isolation and f.check.layer == layer]
    outcomes = [finding.outcome for finding in there]
    asked = [one for one in outcomes if one is not Outcome.NOT_AVAILABLE]
    good = asked.count(Outcome.PASS)
    for worst in (Outcome.FAIL, Outcome.ERROR):
        if worst in asked:
            return worst, f"{good}/{len(asked)}"
    return (Outcome.PASS, f"{good}/{len(asked)}") if asked else (Outcome.NOT_AVAILABLE, "-")


def _matrix_html(result: Result) -> str:
    columns = layers(result.findings)
    if not columns:
        return ""
    head = "".join(f"<th>{_text(name)}</th>" for name in ("isolation", *columns, "start", "whole"))
    rows = []
    for tried in result.isolations:
        cells = "".join(
            f'<td class="{_class(outcome)}">{_text(text)}</td>'
            for outcome, text in (cell(result.findings, tried.name, name) for name in columns)
        )
        times = f"<td>{seconds(tried.start_seconds)}</td><td>{tried.seconds:.1f} s</td>"
        why = f"<br><small>{_text(tried.why)}</small>" if tried.why else ""
        by = f"<br><small>made by {_text(tried.engine)}</small>" if tried.engine else ""
        rows.append(f"<tr><td>{_text(tried.name)}{by}{why}</td>{cells}{times}</tr>")
    body = "".join(rows)
    return f"<h2>Isolation</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def seconds(value: float | None) -> str:
    """Seconds for people; a dash for what was not measured."""
    return "-" if value is None else f"{value:.2f} s"
