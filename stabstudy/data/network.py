"""Reachability of the Hugging Face hub, and silence of its libraries.

Left to themselves they try each file six times, for a minute and with two lines for each failure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException

SECONDS = 5.0
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
LOGGERS = ("huggingface_hub", "transformers", "datasets", "filelock", "httpx", "urllib3")


def forbidden() -> str:
    """The variable that keeps the hub's libraries offline; "" where none does."""
    return next((f"${n} is set" for n in OFFLINE if os.environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE")), "")


def why_not() -> str:
    """Why the hub cannot be reached from here; "" where it answers, whatever it says. Takes at most SECONDS."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    reasons = [f"{endpoint} did not answer within {SECONDS:g} s"]
    # in a thread, which nobody waits for: looking up a name has no time limit of its own
    asked = threading.Thread(target=lambda: reasons.append(_asked(endpoint)), daemon=True)
    asked.start()
    asked.join(SECONDS)
    return reasons[-1]


def _asked(endpoint: str) -> str:
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()  # it answered
    except urllib.error.URLError as error:
        if not isinstance(error.reason, OSError) or "CERTIFICATE" in str(error.reason).upper():
            return (
                ""  # it answered; whom to trust is a question for the libraries, which have certificates of their own
            )
        return f"{endpoint}: {error.reason.strerror or error.reason}"
    except (OSError, HTTPException, ValueError) as error:
        return f"{endpoint}: {error}"
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing below an error from the libraries, while it lasts."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    try:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
