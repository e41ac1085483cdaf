"""What the server notes: one JSON object a line, without what was said unless asked."""

from __future__ import annotations

import datetime
import json
import sys
import threading
from typing import IO, Any


class Log:
    """Lines of JSON on a stream."""

    def __init__(self, stream: IO[str] | None = None, *, texts: bool = False):
        """A log.

        Args:
            stream: where to; ``None``: standard error.
            texts: whether fields that hold what was asked and answered are kept.
        """
        self._stream, self._texts = stream or sys.stderr, texts
        self._lock = threading.Lock()

    def write(self, event: str, /, texts: dict[str, str] | None = None, **fields: Any) -> None:
        """Note something.

        Args:
            event: what happened, in a word.
            texts: what was said, by its name; left out unless asked for.
            **fields: JSON values; ``None`` is left out.
        """
        row = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **{name: value for name, value in fields.items() if value is not None},
            **((texts or {}) if self._texts else {}),
        }
        # ASCII: no control characters of a client's reach a terminal.
        line = json.dumps(row, default=str)
        with self._lock:
            try:
                print(line, file=self._stream, flush=True)
            except OSError:  # a full disk, a closed pipe: the answer is worth more than its line
                return
