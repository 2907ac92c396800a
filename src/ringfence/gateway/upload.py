"""An upload's multipart body as it arrives: the file goes to a sink, the rest is held and small.

The framework's own parser gathers a whole body in files of its own before a route sees it.
"""

from __future__ import annotations

from collections.abc import Callable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ringfence.errors import CallerError

_FIELD = 32
"""Bytes of a field that is no file."""


class UploadForm:
    """One body: exactly one `file`, at most one `expires_in_seconds`, nothing else."""

    def __init__(self, content_type: str, sink: Callable[[memoryview], None]) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise CallerError("request-invalid", "body: send multipart/form-data")
        self._sink = sink
        self._seen: set[str] = set()
        self._part = ""
        self._headers: dict[str, bytes] = {}
        self._header_name = self._header_value = b""
        self._expires = b""
        self._ended = False
        self.filename = self.mime_type = ""
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin,
                    "on_part_data": self._data,
                    "on_header_field": self._field,
                    "on_header_value": self._value,
                    "on_header_end": self._header,
                    "on_headers_finished": self._headed,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise _malformed() from None

    def feed(self, data: bytes) -> None:
        """More of the body. Raises CallerError `request-invalid`."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise _malformed() from None

    def end(self) -> str | None:
        """The body is over: `expires_in_seconds` as it was sent. Raises as `feed` does."""
        if not self._ended:
            raise CallerError("request-invalid", "body: the form has no end")
        if "file" not in self._seen:
            raise CallerError("request-invalid", "file: Field required")
        if "expires_in_seconds" not in self._seen:
            return None
        return self._expires.decode("latin-1")

    def _begin(self) -> None:
        self._part, self._headers = "", {}

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header(self) -> None:
        name = self._header_name.decode("latin-1").lower()
        if name in self._headers:
            # which of them counts must not be a matter of who reads
            raise CallerError("request-invalid", f"body: a part has two headers {name[:40]!r}")
        self._headers[name] = self._header_value
        self._header_name = self._header_value = b""

    def _headed(self) -> None:
        kind, options = parse_options_header(
            self._headers.get("content-disposition", b"").decode("latin-1")
        )
        name = options.get(b"name", b"").decode("latin-1")
        if kind != b"form-data" or name not in {"file", "expires_in_seconds"}:
            raise CallerError("request-invalid", "body: Extra inputs are not permitted")
        if name in self._seen:
            raise CallerError("request-invalid", f"{name}: sent twice")
        self._seen.add(name)
        self._part = name
        if name == "file":
            try:
                self.filename = options.get(b"filename", b"").decode("utf-8")
            except UnicodeDecodeError:
                raise CallerError("request-invalid", "file: write its name in UTF-8") from None
            self.mime_type = self._headers.get("content-type", b"").decode("latin-1")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self._sink(memoryview(data)[start:end])
            return
        self._expires += data[start:end]
        if len(self._expires) > _FIELD:
            raise CallerError("request-invalid", f"{self._part}: too long")

    def _end(self) -> None:
        self._ended = True


def _malformed() -> CallerError:
    return CallerError("request-invalid", "body: not well-formed multipart/form-data")
