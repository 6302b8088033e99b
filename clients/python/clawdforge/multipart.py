"""A file as a multipart body, in pieces."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import BinaryIO

#: Bytes that are in memory at a time.
PIECE = 64 * 1024


def escaped(text: str) -> str:
    """A name for a part's header, as browsers write it."""
    return text.replace("\r", "%0D").replace("\n", "%0A").replace('"', "%22")


def file_part(file: BinaryIO, filename: str, content_type: str) -> tuple[str, Iterator[bytes]]:
    """The body's content type, and the body: one part named ``file``."""
    boundary = uuid.uuid4().hex
    head = (
        f"--{boundary}\r\n"
        f'Content-Disposition: form-data; name="file"; filename="{escaped(filename)}"\r\n'
        f"Content-Type: {escaped(content_type)}\r\n\r\n"
    )

    def pieces() -> Iterator[bytes]:
        yield head.encode()
        while piece := file.read(PIECE):
            yield piece
        yield f"\r\n--{boundary}--\r\n".encode()

    return f"multipart/form-data; boundary={boundary}", pieces()
