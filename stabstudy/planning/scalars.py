"""Rules against scalars that would be misread, in a file or on the command line.

YAML readers turn `no` into false, `012` into 10 and `1:30` into 90; floats that are too small turn into 0; a resolver
such as `${oc.env:HOME}` copies what it finds into files that are kept. None of it happens silently here.
"""

from __future__ import annotations

import re

ENV_PREFIX = "STABSTUDY_"
"""Only environment variables of this prefix may be named in a configuration: their values are written to files."""

INSTANTIATION = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}
"""Hydra's keys that call what they name. Nothing here is ever instantiated, so a file that holds one is hostile."""

_CALLED = re.compile(r"\$\{\s*([^\s${}:]*)\s*:|\$\{[^{}]*\$\{")
_ALLOWED = re.compile(rf"\$\{{\s*oc\.env\s*:\s*{ENV_PREFIX}\w*\s*\}}")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+(?![\w.])")
_PLAIN_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")


def problem(text: str) -> str | None:
    """Why this text may not be a value: an interpolation that is not allowed, a number that underflows. Or None."""
    for found in _CALLED.finditer(text):
        if not _ALLOWED.match(text, found.start()):
            return f"only ${{oc.env:{ENV_PREFIX}...}} and plain references may be interpolated, got {text!r}"
    for found in _NUMBER.finditer(text):
        if float(found.group()) == 0 and found.group(1).strip("0.") != "":
            return f"{found.group()} underflows to 0"
    return None


def ambiguous(text: str, tag: str) -> str | None:
    """Why a plain YAML scalar is not what it looks like, or None. `tag`: the type that YAML 1.1 gives it."""
    kind = tag.rpartition(":")[2]
    if kind == "bool" and text.lower() not in ("true", "false"):
        return f"{text} means a truth value in YAML: write true or false, or quote it"
    if kind == "int" and not _PLAIN_INTEGER.fullmatch(text):
        return f"{text} is a number in another base in YAML: write it in decimal, or quote it"
    if kind == "float" and ":" in text:
        return f"{text} is a number in base 60 in YAML: write it in decimal, or quote it"
    return None
