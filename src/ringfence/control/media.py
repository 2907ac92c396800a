"""Images and documents of messages: which there may be, and what their bytes say they are. PURE.

A model's API refuses a request with an image that is not what it is called, and the image stays in
the conversation: every later turn would be refused, too. So what cannot be one gets no further.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

IMAGES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
PDF = "application/pdf"
PLAIN = "text/plain"
MOST_ENCODED = 6 << 20
"""Characters of base64, and of text that comes as a document, of one turn. They are one line of
the transcript, which holds 8 MiB (`record.transcript.MAX_ENTRY_BYTES`)."""
MOST_BLOCKS = 20
"""Images and documents of one message."""


def kind_of(head: bytes) -> str | None:
    """The media type that the first dozen bytes are of; None when they are of none of these."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    return PDF if head.startswith(b"%PDF-") else None


def is_what_it_says(media_type: str, data: str) -> bool:
    """Whether base64 of an image or a PDF begins as its media type does."""
    try:
        return kind_of(binascii.a2b_base64(data[:16])) == media_type
    except ValueError:
        return False


def fits(block: str, mime_type: str) -> bool:
    """Whether a file that is called this can be the source of an `image` or a `document`."""
    if block == "image":
        return mime_type in IMAGES
    return mime_type == PDF or mime_type.startswith("text/") or mime_type == "application/json"


def sourced(blocks: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Those blocks that are images or documents."""
    return (block for block in blocks if block.get("type") in {"image", "document"})


def file_ids(blocks: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Files that the images and documents among these name, each as often as it is named."""
    sources = (block["source"] for block in sourced(blocks))
    return (source["file_id"] for source in sources if source["type"] == "file")


def encoded(blocks: Iterable[Mapping[str, Any]]) -> int:
    """Characters that the images and documents among these hold themselves."""
    return sum(len(block["source"].get("data", "")) for block in sourced(blocks))


def encoded_size(size: int) -> int:
    """Characters of base64 of so many bytes."""
    return (size + 2) // 3 * 4
