"""Output streams that outlive their reader: neither `... | head`, a full disk nor a closed stream ends a study."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Nowhere(io.TextIOBase):
    """A stream that drops what is written."""

    def write(self, text: str) -> int:
        return len(text)


class Outlet:
    """A text stream that drops what is written once nobody takes it any more; else the stream's own."""

    def __init__(self, stream: TextIO | None):
        self._stream: TextIO | Nowhere = Nowhere() if stream is None else stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:  # a closed pipe, a full disk, a terminal that has gone
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _let_go(self) -> None:
        """Point the stream's descriptor at nothing: what is buffered, now and at exit, goes there."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def outlets() -> Iterator[None]:
    """Standard output and error as Outlets, flushed at the end."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed (`>&-`): else the next file that is opened would be written by every print
            os.open(os.devnull, os.O_RDWR)
    out, err = Outlet(sys.stdout), Outlet(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            out.flush()
            err.flush()
