"""Settings as dataclass fields with a type and rules, read strictly, every problem reported in one line.

Nothing is converted silently: whole numbers are taken for floats, and plain decimal text for floats (some YAML readers
make text of 1e-3); 3.0 is not a depth, `no` is not a number. The standard library only.

The error for data that cannot be used.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")

LONGEST = 2000
"""Characters of a message."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one setting: its dotted name, the rule, and what was received."""

    setting: str
    rule: str
    got: str = ""

    def __str__(self) -> str:
        return f"{short(self.setting)}: {self.rule}" + (f", got {short(self.got, 500)}" if self.got else "")


class ConfigError(ValueError):
    """Every problem found in the settings of a launch; `str()` has one line for each."""

    def __init__(self, problems: list[Problem] | Problem):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(self.problems)  # as its one argument, so that it survives pickling between processes

    def __str__(self) -> str:
        return "\n".join(str(p) for p in self.problems)


@dataclass(frozen=True)
class Issues:
    """The problems and warnings of a launch, collected while it is read, so that all of them are shown at once.

    Problems stop the launch; warnings are shown and the launch goes on. Each is kept once, in order.
    """

    problems: list[Problem] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def refuse(self, setting: str, rule: str, got: str = "", origin: str = "") -> None:
        """Note a problem; `origin` says where the value was written."""
        self.take([Problem(setting, rule, got)], origin)

    def take(self, problems: Iterable[Problem], origin: str = "") -> None:
        """Note problems found elsewhere."""
        for problem in problems:
            located = _at(problem, origin)
            if located not in self.problems:
                self.problems.append(located)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def stop(self) -> None:
        """Raise ConfigError if anything was refused so far."""
        if self.problems:
            raise ConfigError(self.problems)


def _at(problem: Problem, origin: str) -> Problem:
    """The problem with the place of the value behind it; both of a readable length, whatever was typed."""
    if not origin:
        return problem
    where = short(origin)
    if problem.got:
        return replace(problem, got=f"{short(problem.got)} ({where})")
    return replace(problem, rule=f"{problem.rule} ({where})")


def setting(
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
    only: str | None = None,
    because: str | None = None,
) -> Any:
    """A dataclass field with its default and the rules that `read_group` holds a value to.

    `only`: where alone it has an effect, by another setting of its group (`source=text,jsonl`); see `check`.
    `because`: why it has none elsewhere.
    """
    rules = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "only": only, "because": because}
    return dataclasses.field(default=default, metadata={k: v for k, v in rules.items() if v is not None})


def nearest(name: str, known: list[str]) -> str:
    """' (did you mean a, b?)', or every known name where nothing is near, or '' where nothing is known."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f" (did you mean {', '.join(close)}?)"
    return f" (known: {', '.join(known)})" if known and len(known) <= 24 else ""


def group(cls: type[T], *, only: str | None = None) -> T:
    """A dataclass field that holds a group of settings, the frozen dataclass `cls`, at its defaults."""
    return dataclasses.field(default=cls(), metadata={"only": only} if only else {})


def named_fields(cls: type, above: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting of the class and of the groups in it, by its dotted name, in order.

    Raises TypeError where its type is not one that `read_value` knows: a typo fails when the class is defined.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            yield from named_fields(type(field.default), f"{above}{field.name}.")
            continue
        hint = hints[field.name]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not set(members) <= {int, float, bool, str, type(None)}:
            raise TypeError(f"{cls.__name__}.{field.name}: unsupported type {hint}")
        yield above + field.name, field


def check(values: Any, broken: Iterable[Problem]) -> None:
    """Raises ConfigError for broken rules between settings, and for settings that have no effect.

    Those of the first that show no value received get those of the settings that they name.
    """
    problems = []
    for problem in broken:
        given = (spelt(attrgetter(name)(values)) for name in problem.setting.split(", "))
        problems.append(problem if problem.got else dataclasses.replace(problem, got=" and ".join(given)))
    if problems := [*problems, *_idle(values)]:
        raise ConfigError(problems)


def _idle(values: Any, above: str = "") -> Iterator[Problem]:
    """The settings that are not at their default, though their rule `only` says that they have no effect."""
    for field in dataclasses.fields(values):
        name, value, rules = above + field.name, getattr(values, field.name), field.metadata
        key, _, listed = rules.get("only", "").partition("=")
        if key and (other := spelt(getattr(values, key))) not in (allowed := listed.split(",")):
            why = f" ({rules['because']})" if "because" in rules else ""
            rule = f"has an effect with {key}{'s' if len(allowed) > 1 else ''} {', '.join(allowed)} only{why}"
            yield from (Problem(n, rule, f"{key} {other}") for n in _changed(name, value, field.default))
        elif dataclasses.is_dataclass(value):
            yield from _idle(value, f"{name}.")


def _changed(name: str, value: Any, default: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _changed(f"{name}.{field.name}", getattr(value, field.name), getattr(default, field.name))
    elif value != default:
        yield name


def read(cls: type[T], values: Mapping[str, Any], former: Mapping[str, str] = MappingProxyType({})) -> T:
    """The mapping as `cls`, a dataclass of groups of settings. Raises ConfigError of all that is wrong.

    `former`: dotted names that settings had -> those that they have now.
    """
    problems: list[Problem] = []
    read = read_group("", cls, values, problems, [name for name, _ in named_fields(cls)], former)
    if problems:
        raise ConfigError(problems)
    return read


def read_group(
    group: str,
    cls: type[T],
    values: Any,
    problems: list[Problem],
    known: Sequence[str] = (),
    former: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """The mapping as `cls`, a dataclass of `setting` and `group` fields; what is wrong is appended to `problems`.

    `known`: dotted names of other groups' settings, among which a misplaced one is looked for; `former` as in `read`.
    """
    if not isinstance(values, Mapping):
        problems.append(Problem(group, "must be a mapping of settings", show(values)))
        return cls()
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    checked: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{group}.{key}" if group else str(key)
        if (field := fields.get(key)) is None:
            near = f" (did you mean {former[name]}?)" if name in former else _nearest_setting(name, list(fields), known)
            problems.append(Problem(name, f"is not a setting{near}"))
        elif dataclasses.is_dataclass(field.default):
            checked[key] = read_group(name, type(field.default), value, problems, known, former)
        else:
            checked[key] = read_value(name, str(field.type), field.metadata, value, problems, field.default)
    return cls(**checked)


def _nearest_setting(name: str, siblings: list[str], known: Sequence[str]) -> str:
    """The nearest names among the group's own settings, else among all: `model.lr` should find `optim.lr`."""
    group, dot, key = name.rpartition(".")
    own = [f"{group}{dot}{s}" for s in siblings]
    same_key = [n for n in known if n.endswith(f".{key}")]
    close = same_key or [f"{group}{dot}{s}" for s in difflib.get_close_matches(key, siblings, n=3, cutoff=0.5)]
    return f" (did you mean {', '.join(close)}?)" if close else nearest(name, [*own, *known])


def put(nested: dict[str, Any], name: str, value: Any) -> None:
    """Set the value under its dotted name, with the groups on the way there. What is no group is left as it is."""
    *groups, key = name.split(".")
    target: Any = nested
    for group in groups:
        target = target.setdefault(group, {}) if isinstance(target, dict) else None
    if isinstance(target, dict):
        target[key] = value


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Values by dotted names, with these names replaced."""
    return {names.get(name, name): value for name, value in values.items()}


def renamed_below(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A nested mapping, with these dotted names (GROUP.KEY) replaced."""
    nested = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for old, new in names.items():
        group, _, key = old.partition(".")
        if isinstance(inner := nested.get(group), dict) and key in inner:
            put(nested, new, inner.pop(key))
    return nested


def read_value(
    name: str, hint: str, rules: Mapping[str, Any], value: Any, problems: list[Problem], default: Any
) -> Any:
    """The value in its declared type, or the default with a Problem noted."""
    kinds = [k.strip() for k in hint.split("|")]
    if value is None and "None" in kinds:
        return None
    kind = kinds[0]
    if kind == "float" and isinstance(value, str):
        value = _number_from_text(value)
    if kind == "float" and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is bool and {"on", "off"} <= set(rules.get("choices", ())):
        value = "on" if value else "off"  # YAML reads the bare words on and off as true and false
    wanted = {"int": int, "float": float, "bool": bool, "str": str}[kind]
    if type(value) is not wanted:
        problems.append(Problem(name, f"must be {_expected(kind, kinds, rules)}", show(value)))
        return default
    if not _within(value, rules):
        problems.append(Problem(name, f"must be {_expected(kind, kinds, rules)}", show(value)))
        return default
    return value


_NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def _number_from_text(text: str) -> float | str:
    """The number that the text spells in decimal; the text where it is none, or one that readers disagree on (012)."""
    return float(text) if _NUMBER.fullmatch(text) else text


def _within(value: Any, rules: Mapping[str, Any]) -> bool:
    if "choices" in rules:
        return value in rules["choices"]
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return (
        value >= rules.get("ge", value)
        and value <= rules.get("le", value)
        and (value > rules["gt"] if "gt" in rules else True)
        and (value < rules["lt"] if "lt" in rules else True)
    )


def _expected(kind: str, kinds: list[str], rules: Mapping[str, Any]) -> str:
    null = " or null" if "None" in kinds else ""
    if "choices" in rules:
        return f"one of {', '.join(rules['choices'])}{null}"
    noun = {"int": "a whole number", "float": "a finite number", "bool": "true or false", "str": "text"}[kind]
    low = f"[{rules['ge']:g}" if "ge" in rules else f"({rules['gt']:g}" if "gt" in rules else ""
    high = f"{rules['le']:g}]" if "le" in rules else f"{rules['lt']:g})" if "lt" in rules else ""
    return noun + (f" in {low}, {high}" if low and high else "") + null


def show(value: Any) -> str:
    """The value as code would spell it, at most 60 characters."""
    return short(repr(value), 60)


def spelt(value: Any) -> str:
    """The value as YAML spells it, numbers in at most 6 digits."""
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def short(text: str, most: int = 200) -> str:
    """The text, or its first characters and dots."""
    return text if len(text) <= most else text[: most - 3] + "..."


def safe(text: str) -> str:
    """The text on one line, control characters spelled out: a file's name or value must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def line(text: str) -> str:
    """The text as one line of a message: safe, and at most 2,000 characters, of its two ends where there are more."""
    whole, half = safe(text), LONGEST // 2
    return whole if len(whole) <= LONGEST else f"{whole[:half]} ... {whole[-half:]}"


class DataError(Exception):
    """Data, or a setting of it, that cannot be used: one line with setting, rule, value; file and line where known.

    `problem` is the same as a `config.Problem`, to be listed with the other problems of a launch.
    """

    def __init__(self, setting: str, rule: str, got: str = ""):
        super().__init__(setting, rule, got)  # all three, so that it survives pickling between processes
        self.problem = Problem(setting, rule, got)

    def __str__(self) -> str:
        return str(self.problem)
