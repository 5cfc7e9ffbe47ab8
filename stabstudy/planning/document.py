"""A strict YAML reader with the line of every problem.

YAML readers turn `no` into false, `012` into 10 and `1:30` into 90; floats that are too small turn into 0; a resolver
such as `${oc.env:HOME}` copies what it finds into files that are kept. None of it happens silently here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stabstudy import disk
from stabstudy.settings import ConfigError, Problem
from stabstudy.wording import first_line

ENV_PREFIX = "STABSTUDY_"
"""Only environment variables of this prefix may be named in a configuration: their values are written to files."""

INSTANTIATION = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}
"""Hydra's keys that call what they name. Nothing here is ever instantiated, so a file that holds one is hostile."""

_CALLED = re.compile(r"\$\{\s*([^\s${}:]*)\s*:|\$\{[^{}]*\$\{")
_ALLOWED = re.compile(rf"\$\{{\s*oc\.env\s*:\s*{ENV_PREFIX}\w*\s*\}}")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+(?![\w.])")
_PLAIN_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")

UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, KeyError, AttributeError, TypeError, RecursionError)
"""What YAML readers raise: `!!bool x` is a KeyError in them, `!!timestamp x` an AttributeError."""

MAX_BYTES = 2**20
MAX_NODES = 10_000
"""With aliases written out: a file of one kilobyte can stand for a billion nodes."""


def scalar_problem(text: str) -> str | None:
    """Why this text may not be a value: an interpolation that is not allowed, a number that underflows. Or None."""
    for match in _CALLED.finditer(text):
        if not _ALLOWED.match(text, match.start()):
            return f"only ${{oc.env:{ENV_PREFIX}...}} and plain references may be interpolated, got {text!r}"
    for match in _NUMBER.finditer(text):
        if float(match.group()) == 0 and match.group(1).strip("0.") != "":
            return f"{match.group()} underflows to 0"
    return None


@dataclass(frozen=True)
class Document:
    """A checked file: its content, and the line of every key under its dotted path."""

    name: str
    text: str
    content: dict[str, Any] = field(repr=False)
    lines: dict[str, int] = field(repr=False)

    def where(self, path: str) -> str:
        """'sweeps/x.yaml:12', or the file alone where the key is not in it."""
        return f"{self.name}:{self.lines[path]}" if path in self.lines else self.name


def read(path: Path, name: str) -> Document:
    """The file as a Document, called `name` in messages. Raises ConfigError with every problem of the text."""
    text, lines = check(path, name)
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except UNREADABLE as error:
        raise ConfigError(Problem(name, f"is not valid YAML: {first_line(error)}")) from error
    assert isinstance(content, dict)  # the root was seen to be a mapping
    return Document(name, text, {str(k): v for k, v in content.items()}, lines)


def check(path: Path, name: str) -> tuple[str, dict[str, int]]:
    """The file's text, and the line of every dotted key. Raises ConfigError with every problem of the text."""
    text = _decoded(path, name)
    lines: dict[str, int] = {}
    try:
        problems = list(_walk(_parsed(text, name), "", name, lines, set()))
    except RecursionError as error:
        raise ConfigError(Problem(name, "is nested too deeply")) from error
    if problems:
        raise ConfigError(problems)
    return text, lines


def _decoded(path: Path, name: str) -> str:
    if kind := disk.not_a_file(path):  # a pipe would be waited for
        raise ConfigError(Problem(name, f"is {kind}, not a file"))
    try:
        with path.open("rb") as f:
            raw = f.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(Problem(name, f"cannot be read ({error.strerror})")) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(Problem(name, "must be at most 1 MiB"))
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(Problem(f"{name}:1", "starts with a byte order mark: save it as UTF-8 without one"))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(Problem(f"{name}:{line}", "is not UTF-8", f"byte 0x{raw[error.start]:02x}")) from error


def _parsed(text: str, name: str) -> yaml.Node:
    """The node graph, aliases still shared, of a file whose written-out size is bounded."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        at = f"{name}:{mark.line + 1}" if mark else name
        reason = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(Problem(at, f"is not valid YAML: {reason}")) from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(Problem(f"{name}:1", "is empty" if root is None else "must hold a mapping of settings"))
    if _size(root, {}, name) > MAX_NODES:
        raise ConfigError(Problem(name, f"holds more than {MAX_NODES} values once its aliases are written out"))
    return root


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _size(node: yaml.Node, known: dict[int, int], name: str) -> int:
    """Number of nodes with every alias written out; each distinct node is visited once."""
    if id(node) not in known:
        known[id(node)] = -1
        known[id(node)] = 1 + sum(_size(child, known, name) for child in _children(node))
    if known[id(node)] < 0:
        raise ConfigError(Problem(f"{name}:{node.start_mark.line + 1}", "an alias contains itself"))
    return known[id(node)]


def _walk(node: yaml.Node, path: str, name: str, lines: dict[str, int], seen: set[int]) -> Iterator[Problem]:
    """Problems of every scalar and key below `node`; fills `lines`. Each distinct node is visited once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        rule = scalar_problem(node.value)
        if rule is None and node.style is None:
            rule = _ambiguous(node.value, node.tag)
        if rule:
            yield Problem(f"{name}:{node.start_mark.line + 1}", f"{path}: {rule}" if path else rule)
    elif isinstance(node, yaml.MappingNode):
        yield from _walk_mapping(node, path, name, lines, seen)
    else:
        for item in _children(node):
            yield from _walk(item, path, name, lines, seen)


def _walk_mapping(
    node: yaml.MappingNode, path: str, name: str, lines: dict[str, int], seen: set[int]
) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            yield Problem(f"{name}:{line}", "a key must be text")
            continue
        if not key.tag.endswith(":str") and _ambiguous(key.value, key.tag) is None:
            kind = key.tag.rpartition(":")[2]
            yield Problem(f"{name}:{line}", f"a key must be text: {key.value} is of type {kind} in YAML; quote it")
        below = f"{path}.{key.value}" if path else key.value
        lines.setdefault(below, line)
        if key.value in first:
            yield Problem(f"{name}:{line}", f"key {key.value!r} is listed twice (first on line {first[key.value]})")
        if key.value in INSTANTIATION:
            yield Problem(f"{name}:{line}", f"{below}: not allowed: nothing is ever instantiated from a configuration")
        first.setdefault(key.value, line)
        yield from _walk(key, below, name, lines, seen)
        yield from _walk(value, below, name, lines, seen)


def _ambiguous(text: str, tag: str) -> str | None:
    """Why a plain YAML scalar is not what it looks like, or None. `tag`: the type that YAML 1.1 gives it."""
    kind = tag.rpartition(":")[2]
    if kind == "bool" and text.lower() not in ("true", "false"):
        return f"{text} means a truth value in YAML: write true or false, or quote it"
    if kind == "int" and not _PLAIN_INTEGER.fullmatch(text):
        return f"{text} is a number in another base in YAML: write it in decimal, or quote it"
    if kind == "float" and ":" in text:
        return f"{text} is a number in base 60 in YAML: write it in decimal, or quote it"
    return None
