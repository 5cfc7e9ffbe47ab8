"""Chats: their turns under any names, and the templates that write them as a prompt and a completion.

The names in a row are the usual ones (`Names`), or those that a dataset_info.json in the folder of the data gives to
the file, as LLaMA-Factory reads it: formatting (alpaca, sharegpt), columns and tags. A column or tag that an entry with
`columns` or `tags` leaves out is none.

The plain template writes each turn as its role, a colon, a space, its content and an empty line; the prompt ends with
what introduces the answer, `assistant: `, and the completion is the answer's content alone.

A tokenizer's own template is a Jinja text, chat_template.jinja beside it or in its tokenizer_config.json. The prompt is
its rendering of all turns but the last with what introduces an answer, the completion what its rendering of all turns
adds. It runs in Jinja's sandbox with what transformers offers to it, but for the date: data are the same every day.
Special tokens that it writes are themselves; those that a turn spells out are ordinary text: GUARD stands within each
of them until it is tokenized.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from stabstudy.data.files import INFO, DataFile, cause
from stabstudy.settings import DataError
from stabstudy.wording import first_line

Turn = tuple[str, str]  # role, content

ASSISTANT = "assistant"
GUARD = "\ufdd0"  # no character: Unicode keeps it for programs' own use


@dataclass(frozen=True)
class Names:
    """Where a row holds what; several names: the first that is there."""

    messages: tuple[str, ...] = ("messages", "conversations")
    system: str | None = None
    label: tuple[str, ...] = ("label", "kto_tag")
    chosen: str | None = "chosen"
    rejected: str | None = "rejected"
    role: tuple[str, ...] = ("role", "from")
    content: tuple[str, ...] = ("content", "value")
    roles: Mapping[str, str] = field(default_factory=lambda: {"human": "user", "gpt": ASSISTANT})
    listed: bool = False  # in dataset_info.json: no other roles than these
    alpaca: Mapping[str, str | None] | None = None  # prompt, query, response, history; None: chats are lists of turns

    def turns(self, written: Any, key: str) -> list[Turn]:
        """Those of a list. Raises ValueError with the reason."""
        if not isinstance(written, list) or not written:
            raise ValueError(f"{key!r} must be a list of turns")
        return [self._turn(turn, key) for turn in written]

    def conversation(self, row: Mapping[str, Any]) -> list[Turn] | None:
        """The turns of a row, its system prompt first; None where it has none. Raises ValueError with the reason."""
        if self.alpaca is not None:
            return self._question(row, self.alpaca)
        key = _first(self.messages, row)
        if key is None:
            return None
        return self._system(row, key) + self.turns(row[key], key)

    def _turn(self, turn: Any, key: str) -> Turn:
        named = turn if isinstance(turn, dict) else {}
        role, content = (named.get(_first(names, named) or "") for names in (self.role, self.content))
        if not isinstance(role, str) or not isinstance(content, str):
            kinds = " (or ".join(f"{r!r} and {c!r}" for r, c in zip(self.role, self.content, strict=True))
            kinds += ")" * (len(self.role) > 1)
            raise ValueError(f"a turn of {key!r} must have {kinds} that are text")
        if self.listed and role not in self.roles:
            raise ValueError(f"a turn of {key!r} has the role {role!r}, and {INFO} names {', '.join(self.roles)}")
        return self.roles.get(role, role), content

    def _system(self, row: Mapping[str, Any], key: str | None) -> list[Turn]:
        """The turn of a row's own system prompt, if it has one."""
        name = "system" if key == "conversations" and not self.listed else self.system
        text = None if name is None else row.get(name)
        return [("system", text)] if isinstance(text, str) and text else []

    def _question(self, row: Mapping[str, Any], columns: Mapping[str, str | None]) -> list[Turn]:
        """Of an alpaca row: what was said before, then the prompt and, on a line of its own, the query."""
        turns = self._system(row, None)
        for pair in (row.get(columns["history"]) if columns["history"] else None) or []:
            if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
                raise ValueError(f"{columns['history']!r} must be a list of pairs of texts")
            turns += [("user", pair[0]), (ASSISTANT, pair[1])]
        parts = [row[name] for name in (columns["prompt"], columns["query"]) if name is not None and row.get(name)]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{columns['prompt']!r} and {columns['query']!r} must be text")
        return [*turns, ("user", "\n".join(parts))]


def _first(names: tuple[str, ...], row: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in row), None)


# --- dataset_info.json


def entry(file: DataFile) -> dict[str, Any] | None:
    """What dataset_info.json in the folder of the data says about the names in a file; None: nothing.

    Raises DataError where it cannot be read, or says two things.
    """
    said = [_known(one) for one in _info(file).values() if _is_of(one, file)]
    if any(one != said[0] for one in said):
        raise DataError("data.path", f"{INFO} describes {file.name} in two ways; keep the entry that is meant")
    return said[0] if said else None


def names(file: DataFile) -> Names:
    """The names in a file's rows. Raises DataError, see `entry`."""
    described = entry(file)
    if described is None:
        return Names()
    columns, tags = described["columns"], described["tags"]
    alpaca = {"prompt": "instruction", "query": "input", "response": "output", "history": None}
    if columns:
        alpaca = {name: columns.get(name) for name in alpaca}
    usual = {"role": "from", "content": "value", "user": "human", "assistant": "gpt", "system": "system"}
    usual |= {"observation": "observation", "function": "function_call"}
    tag = {name: tags.get(f"{name}_tag") if tags else written for name, written in usual.items()}
    roles = {tag[name]: name for name in ("user", ASSISTANT, "system", "observation", "function") if tag[name]}
    return Names(
        messages=(columns.get("messages") or "conversations",),
        system=columns.get("system"),
        label=(columns["kto_tag"],) if columns.get("kto_tag") else (),
        chosen=columns.get("chosen"),
        rejected=columns.get("rejected"),
        role=(tag["role"] or usual["role"],),
        content=(tag["content"] or usual["content"],),
        roles={written: name for written, name in roles.items() if written},
        listed=True,
        alpaca=None if described["formatting"] == "sharegpt" else alpaca,
    )


def _info(file: DataFile) -> dict[str, Any]:
    path = file.path.parents[file.name.count("/")] / INFO
    if not path.is_file():
        return {}
    try:
        body = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("data.path", f"{path}: cannot be read ({cause(error)})") from error
    return body if isinstance(body, dict) else {}


def _is_of(one: Any, file: DataFile) -> bool:
    name = one.get("file_name") if isinstance(one, dict) else None
    return isinstance(name, str) and (file.name == name or file.name.startswith(f"{name.rstrip('/')}/"))


def _known(one: dict[str, Any]) -> dict[str, Any]:
    """The part of an entry that is read here."""
    formatting = one.get("formatting", "alpaca")
    tables = [one.get(key) or {} for key in ("columns", "tags")]
    is_text = all(isinstance(t, dict) and all(v is None or isinstance(v, str) for v in t.values()) for t in tables)
    if formatting not in ("alpaca", "sharegpt") or not is_text:
        rule = f"{INFO}: formatting must be alpaca or sharegpt, columns and tags objects of names"
        raise DataError("data.path", rule, json.dumps(one))
    return {"formatting": formatting, "columns": tables[0], "tags": tables[1]}


# --- templates


class Template(Protocol):
    """Writes turns and the answer to them as prompt and completion."""

    is_own: bool  # the tokenizer's: special tokens in what it writes are themselves

    def __call__(self, turns: list[Turn], answer: str) -> tuple[str, str]:
        """Raises ValueError with the reason."""


class Plain:
    """The plain template."""

    is_own = False

    def __call__(self, turns: list[Turn], answer: str) -> tuple[str, str]:
        return "".join(f"{role}: {content}\n\n" for role, content in turns) + f"{ASSISTANT}: ", answer


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's own template."""

    text: str
    tokens: dict[str, str]  # bos_token, eos_token, ... -> the token, for the template
    special: tuple[str, ...] = ()  # tokens that are guarded where a turn spells them out
    is_own = True

    @property
    def identity(self) -> str:
        """sha256 of what decides how it writes."""
        return hashlib.sha256(json.dumps([self.text, sorted(self.tokens.items())]).encode()).hexdigest()

    def __call__(self, turns: list[Turn], answer: str) -> tuple[str, str]:
        messages = [{"role": role, "content": self._guarded(content)} for role, content in turns]
        last = {"role": ASSISTANT, "content": self._guarded(answer)}
        try:
            prompt, whole = self._render(messages, True), self._render([*messages, last], False)
        except Exception as error:  # a template may do anything that its sandbox allows
            raise ValueError(f"the tokenizer's chat template refuses it ({first_line(error)})") from error
        if not whole.startswith(prompt):
            rule = "the tokenizer's chat template writes the prompt in another way once an answer follows"
            raise ValueError(f"{rule}, so no completion begins there: '{prompt[-40:]}' is not in '{whole[-80:]}'")
        return prompt, whole[len(prompt) :] if answer else ""

    def _render(self, messages: list[dict[str, str]], introduce: bool) -> str:
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": introduce}
        return str(_compiled(self.text).render(self.tokens | given))

    def _guarded(self, content: str) -> str:
        if GUARD in content:
            raise ValueError(f"a turn holds U+{ord(GUARD):X}, which is no character")
        for token in self.special:
            content = content.replace(token, token[:1] + GUARD + token[1:])
        return content


def template_beside(file: Path) -> ChatTemplate | None:
    """That of a tokenizer's file, as transformers saves them. Raises DataError where it cannot be read."""
    jinja, beside = file.with_name("chat_template.jinja"), file.with_name("tokenizer_config.json")
    try:
        config = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
        text = jinja.read_text("utf-8") if jinja.is_file() else config.get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        rule = f"its chat template cannot be read ({cause(error)})"
        raise DataError("data.tokenizer", rule, str(file.parent)) from error
    return chat_template(text, config)


def chat_template(text: Any, tokens: Mapping[str, Any]) -> ChatTemplate | None:
    """That called default where there are several; `tokens` are a tokenizer's settings, its named tokens among them."""
    if isinstance(text, list):
        text = {one.get("name"): one.get("template") for one in text if isinstance(one, dict)}
    if isinstance(text, dict):
        text = text.get("default")
    contents = {name: t.get("content") if isinstance(t, dict) else t for name, t in tokens.items()}
    named = {name: t for name, t in contents.items() if name.endswith("_token") and isinstance(t, str)}
    return ChatTemplate(text, named) if isinstance(text, str) and text else None


Ids = NDArray[np.integer[Any]]
Encode = Callable[[list[str]], list[Ids]]


def encode(texts: list[str], special: Mapping[str, int], ordinary: Encode, marked: Encode) -> list[Ids]:
    """The ids of what a template wrote.

    special: the id of each special token. ordinary: makes text of those that are spelled out; marked: makes them
    themselves, as transformers does. A text that has both kinds is tokenized piece by piece.
    """
    return [
        _in_pieces(text, special, ordinary) if GUARD in text else ids
        for text, ids in zip(texts, marked(texts), strict=True)
    ]


def _in_pieces(text: str, special: Mapping[str, int], ordinary: Encode) -> Ids:
    borders = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    pieces = re.split(f"({borders})", text)
    between = ordinary([piece.replace(GUARD, "") for piece in pieces[::2]])
    marks = [np.array([special[token]], np.int64) for token in pieces[1::2]]
    return np.concatenate([part for pair in zip(between, [*marks, marks[:0]], strict=True) for part in pair])


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
    """Raises jinja2's errors."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    # marks of what a trainer may take for the answer: no text
    text = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", text)
    return environment.from_string(re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", text))


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
