"""Check within seconds whether the Hub answers at all.

The Hub's client tries for half a minute, and writes each attempt on the terminal, before it says so.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable

from onebase_engine.redaction import redacted

CONNECT_SECONDS = 2.0
"""Time limit, in seconds, for resolving the Hub's address and connecting to it."""
ANSWER_SECONDS = 5.0
"""Time limit, in seconds, for the first answer through that connection."""

_NUMBER = re.compile(r"^\[Errno -?\d+\] ")


def hub_silence(repo: str, kind: str = "models") -> str | None:
    """Return the reason why nothing can be fetched from the Hub now, or None if it answers.

    Any answer about the repository, other than a server error, is left to the Hub's client to explain. From
    then on the client keeps its warnings and bars off the terminal: its errors repeat them.

    Args:
        kind: `models` or `datasets`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    disable_progress_bars()
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    reason = _Question(f"{constants.ENDPOINT}/api/{kind}/{repo}").answer()
    return f"{redacted(constants.ENDPOINT)} {reason}" if reason else None


def first_line(error: Exception) -> str:
    """Return a library's error message as one line, without its error number and full stop."""
    lines = _NUMBER.sub("", str(error).strip()).splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__


class _Question(threading.Thread):
    """A request in its own thread, because a name lookup cannot be given a time limit."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._connected = threading.Event()
        self._done = threading.Event()
        self._reason = ""

    def answer(self) -> str:
        """Ask, and return what is wrong; empty if nothing is."""
        from huggingface_hub import get_session

        with contextlib.suppress(Exception):  # which comes again below
            get_session()  # Reading the certificates is not the Hub's time.
        self.start()
        if not self._connected.wait(CONNECT_SECONDS):
            return f"cannot be reached (no connection within {CONNECT_SECONDS:g} s)"
        if not self._done.wait(ANSWER_SECONDS):
            return f"does not answer (nothing came within {ANSWER_SECONDS:g} s)"
        return self._reason

    def run(self) -> None:
        try:
            self._reason = self._ask(self._saw)
        except Exception as error:  # no address, no route, a refused connection, a certificate
            self._reason = f"cannot be reached ({first_line(error)})"
        self._done.set()
        self._connected.set()

    def _ask(self, trace: Callable[[str, object], None]) -> str:
        from huggingface_hub import get_session

        # Longer than anybody waits: that it gives up is not to be taken for the reason.
        limit = 4 * ANSWER_SECONDS
        response = get_session().head(self._url, timeout=limit, extensions={"trace": trace})
        return f"answers with status {response.status_code}" if response.status_code >= 500 else ""

    def _saw(self, event: str, info: object) -> None:
        if event.endswith(("connect_tcp.complete", "send_request_headers.started")):
            self._connected.set()
