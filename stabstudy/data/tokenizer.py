"""Tokenizers for bytes, local BPE files and models of `transformers`.

    bytes                       0-255, then bos 256 and eos 257 (Lingua's byte tokenizer)
    DIR, DIR/tokenizer.json     through `tokenizers`
    DIR, VOCAB.json,MERGES.txt  GPT-2's byte-level BPE from its two files, in a folder under one of the names of PAIRS
    NAME, NAME@REVISION, DIR    through `transformers.AutoTokenizer`; code that comes with a tokenizer is never run

Text cannot forge a document's border: special tokens that are spelled out in it are tokenized as ordinary text. Only
those are themselves that a tokenizer's own chat template writes (`chats`).

The hub is asked once, for at most SECONDS, before its libraries are: left to themselves they try each file six times,
for a minute and with two lines for each failure.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stabstudy import extras
from stabstudy.data import chats
from stabstudy.data.chats import ChatTemplate
from stabstudy.data.files import cause
from stabstudy.settings import DataError, show
from stabstudy.wording import first_line

if TYPE_CHECKING:
    import tokenizers

Ids = NDArray[np.integer[Any]]

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("gpt2_encoder.json", "gpt2_vocab.bpe"))
FORMS = (
    "write bytes, a tokenizer.json, two files in quotes as 'VOCAB,MERGES', a hub name, or a folder with a "
    f"tokenizer.json or with {' or '.join(' and '.join(pair) for pair in PAIRS)}"
)
"""What `data.tokenizer` may be, for the messages about what it is not."""
HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?(@[\w./-]{1,200})?")
AUTO_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "config.json",
)
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tiktoken.model", "tekken.json", "tokenizer_config.json"),
)
BOS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")  # looked for where no tokenizer_config.json names it
EOS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]")

SECONDS = 5.0
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
LOGGERS = ("huggingface_hub", "transformers", "datasets", "filelock", "httpx", "urllib3")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. `encode` takes texts and returns the ids of each, without bos and eos.

    `decode` is for reading: it spells out special tokens, and replaces bytes that are no text by U+FFFD.
    """

    vocab_size: int  # largest id + 1: the rows of an embedding
    bos: int | None  # before each document; None where the tokenizer has none or uses its eos for it
    eos: int | None  # behind each document
    sha256: str  # of the whole vocabulary and its rules
    encode: Callable[[list[str]], list[Ids]]
    decode: Callable[[list[int]], str]
    template: ChatTemplate | None = None  # its own, of chats
    encode_chats: Callable[[list[str]], list[Ids]] | None = None  # as `encode`, of what `template` wrote


@dataclass(frozen=True)
class _Place:
    """Where a tokenizer is: its kind (bytes | json | pair | auto), its local files, and what `auto` loads."""

    kind: str
    files: tuple[Path, ...] = ()
    name: str = ""
    revision: str | None = None


def identity(name: str) -> str:
    """What the tokenizer is without loading it: local files' content, else its name. Raises DataError if not there."""
    place = _locate(name)
    if not place.files:
        return name
    try:
        content = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in place.files]
    except OSError as error:
        raise DataError("data.tokenizer", f"must be readable ({error.strerror})", show(name)) from error
    return hashlib.sha256(json.dumps([place.kind, content]).encode()).hexdigest()


def own_template(name: str) -> ChatTemplate | None:
    """The chat template beside a local tokenizer, which is not loaded. Raises DataError where it cannot be read."""
    place = _locate(name)
    return chats.template_beside(place.files[0]) if place.kind in ("json", "auto") and place.files else None


def template_identity(name: str) -> str:
    """What the chat template is; "" where there is none. That of a tokenizer of the hub is known by the name alone."""
    if _locate(name) == _Place("auto", (), *_named(name)):
        return "of the hub"
    template = own_template(name)
    return template.identity if template is not None else ""


def packages(name: str) -> set[str]:
    """The optional packages that loading it takes. Raises DataError for a name under which nothing can be."""
    return {"bytes": set(), "auto": {"transformers", "tokenizers"}}.get(_locate(name).kind, {"tokenizers"})


def load(name: str, offline: bool = False) -> Tokenizer:
    """The tokenizer of a `data.tokenizer` setting; `offline`: the hub is not asked. Raises DataError."""
    place = _locate(name)
    if place.kind == "bytes":
        return Tokenizer(258, 256, 257, hashlib.sha256(b"bytes").hexdigest(), _encode_bytes, _decode_bytes)
    if reasons := extras.why_not(packages(name)):
        raise DataError("data.tokenizer", reasons[0], show(name))
    try:
        return _load_auto(place, offline) if place.kind == "auto" else _load_files(place)
    except DataError:
        raise
    except Exception as error:  # `tokenizers` raises nothing narrower, AutoTokenizer anything
        raise DataError("data.tokenizer", _explained(error), show(name)) from error


def _encode_bytes(texts: list[str]) -> list[Ids]:
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]


def _decode_bytes(ids: list[int]) -> str:
    special = {256: b"<bos>", 257: b"<eos>"}
    return b"".join(special.get(i) or bytes([i]) for i in ids).decode("utf-8", "replace")


def _locate(name: str) -> _Place:
    """Raises DataError for a name under which nothing can be."""
    try:
        place = _place(name)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a folder not ours, a user not there
        raise DataError("data.tokenizer", f"cannot be looked for ({cause(error)}); {FORMS}", show(name)) from error
    if place.kind == "auto" and not place.files and not HUB_NAME.fullmatch(name):
        raise DataError("data.tokenizer", f"is not there, and not the form of a hub name; {FORMS}", show(name))
    return place


def _place(name: str) -> _Place:
    if name == "bytes":
        return _Place("bytes")
    first, _, second = name.partition(",")
    if second:
        return _Place("pair", (_file(first), _file(second)))
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file() or path.suffix == ".json" or name.startswith((".", "/", "~")):
        file = _file(name)
        if any(file.name in pair and all((file.parent / part).is_file() for part in pair) for pair in PAIRS):
            rule = f"is one of two files that are a tokenizer together: name their folder, {file.parent}"
            raise DataError("data.tokenizer", rule, show(name))
        if file.suffix != ".json":
            raise DataError("data.tokenizer", f"one file must be a tokenizer.json; {FORMS}", show(name))
        return _Place("json", _with_config(file))
    return _Place("auto", (), *_named(name))


def _named(name: str) -> tuple[str, str | None]:
    """Repository and revision of a hub name."""
    repo, _, revision = name.partition("@")
    return repo, revision or None


def _in_folder(folder: Path) -> _Place:
    if (folder / "tokenizer.json").is_file():
        return _Place("json", _with_config(folder / "tokenizer.json"))
    for vocab, merges in PAIRS:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return _Place("pair", (folder / vocab, folder / merges))
    paths = tuple(sorted({path for pattern in AUTO_FILES for path in folder.glob(pattern) if path.is_file()}))
    if not paths:
        raise DataError("data.tokenizer", f"the folder holds no tokenizer; {FORMS}", str(folder))
    return _Place("auto", paths, str(folder))


def _file(name: str) -> Path:
    path = Path(name.strip()).expanduser()
    if not path.is_file():
        raise DataError("data.tokenizer", f"must be a file that exists; {FORMS}", show(name))
    return path


def _with_config(file: Path) -> tuple[Path, ...]:
    config = file.with_name("tokenizer_config.json")
    return (file, config) if config.is_file() else (file,)


def _load_files(place: _Place) -> Tokenizer:
    import tokenizers

    if place.kind == "json":
        core = tokenizers.Tokenizer.from_file(str(place.files[0]))
        core.no_padding()
        core.no_truncation()
    else:
        core = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, place.files)))
        core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.encode_special_tokens = True
    special = {token.content: number for number, token in core.get_added_tokens_decoder().items() if token.special}
    config = json.loads(place.files[1].read_text("utf-8")) if place.kind == "json" and place.files[1:] else None
    bos, eos = (_special(core, config, key, known) for key, known in (("bos_token", BOS), ("eos_token", EOS)))

    def encode(texts: list[str]) -> list[Ids]:
        return [np.array(e.ids, np.int64) for e in core.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_special(texts: list[str]) -> list[Ids]:
        core.encode_special_tokens = False
        try:
            return encode(texts)
        finally:
            core.encode_special_tokens = True

    def decode(ids: list[int]) -> str:
        if core.decoder is not None:
            return str(core.decode(ids, skip_special_tokens=False))
        # not made the decoder of `core`: its rules are part of what the data are known by
        return str(tokenizers.decoders.ByteLevel().decode([core.id_to_token(i) or "\ufffd" for i in ids]))

    loaded = _tokenizer(core.get_vocab(), bos, eos, core.to_str(), encode, decode)
    template = chats.template_beside(place.files[0]) if place.kind == "json" else None
    return _with_template(loaded, template, special, encode_special)


def _with_template(
    loaded: Tokenizer,
    template: ChatTemplate | None,
    special: Mapping[str, int],
    encode_special: Callable[[list[str]], list[Ids]],
) -> Tokenizer:
    if template is None:
        return loaded
    encode = partial(chats.encode, special=special, ordinary=loaded.encode, marked=encode_special)
    return replace(loaded, template=replace(template, special=tuple(special)), encode_chats=encode)


def _special(core: tokenizers.Tokenizer, config: dict[str, Any] | None, key: str, known: tuple[str, ...]) -> int | None:
    """The id of a special token: as in tokenizer_config.json, else the first usual name in the vocabulary.

    Raises DataError for one that is named and not in the vocabulary: documents would run into each other.
    """
    if config is not None and key in config:
        token = config[key]["content"] if isinstance(config[key], dict) else config[key]
        if token is not None and core.token_to_id(token) is None:
            raise DataError(
                "data.tokenizer", f"tokenizer_config.json names an {key} that the vocabulary lacks", show(token)
            )
        known = () if token is None else (token,)
    ids = (core.token_to_id(token) for token in known)
    return next((id for id in ids if id is not None), None)


def _load_auto(place: _Place, offline: bool) -> Tokenizer:
    revision = place.revision or "main"
    absent = "" if place.files else "not asked" if offline else hub_forbidden() or why_no_hub()
    if absent and not _is_downloaded(place.name, revision):
        rule = f"cannot be loaded: it is not on this machine, and the hub cannot be reached ({absent})"
        raise DataError("data.tokenizer", rule, show(place.name))
    from transformers import AutoTokenizer  # takes seconds, so only for what is there

    with quiet_hub():
        auto = AutoTokenizer.from_pretrained(
            place.name, revision=revision, trust_remote_code=False, local_files_only=bool(place.files or absent)
        )
    for key, token, number in (("bos", auto.bos_token, auto.bos_token_id), ("eos", auto.eos_token, auto.eos_token_id)):
        if token is not None and (number is None or (number == auto.unk_token_id and token != auto.unk_token)):
            raise DataError("data.tokenizer", f"names an {key}_token that the vocabulary lacks", show(token))

    def encode(texts: list[str]) -> list[Ids]:
        encoded = auto(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return [np.array(ids, np.int64) for ids in encoded]

    def decode(ids: list[int]) -> str:
        return str(auto.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def encode_special(texts: list[str]) -> list[Ids]:
        encoded = auto(texts, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(ids, np.int64) for ids in encoded]

    vocab = auto.get_vocab()
    rules = auto.backend_tokenizer.to_str() if auto.is_fast else type(auto).__name__
    loaded = _tokenizer(vocab, auto.bos_token_id, auto.eos_token_id, rules, encode, decode)
    brought = chats.chat_template(auto.chat_template, auto.special_tokens_map)
    template = chats.template_beside(place.files[0]) if place.files else brought
    special = {token.content: number for number, token in auto.added_tokens_decoder.items() if token.special}
    return _with_template(loaded, template, special, encode_special)


def _is_downloaded(name: str, revision: str) -> bool:
    """Whether the hub's cache has a vocabulary of that name. Without one the library would make an empty tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in VOCABULARIES)


def _tokenizer(
    vocab: dict[str, int],
    bos: int | None,
    eos: int | None,
    rules: str,
    encode: Callable[[list[str]], list[Ids]],
    decode: Callable[[list[int]], str],
) -> Tokenizer:
    largest = max(vocab.values(), default=-1)
    if not vocab or min(vocab.values()) < 0 or largest >= 2 * len(vocab) + 1024:
        # Some holes are normal (GPT-4's has 17); a vocabulary of holes is a wrong file and would waste the embedding.
        got = f"{len(vocab)} tokens, largest id {largest}"
        raise DataError("data.tokenizer", "the size of the vocabulary must fit its ids", got)
    whole = json.dumps([sorted(vocab.items()), bos, eos, rules])
    sha256 = hashlib.sha256(whole.encode()).hexdigest()
    return Tokenizer(largest + 1, bos if bos != eos else None, eos, sha256, encode, decode)


def _explained(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "wants to run code of its own, which is never run"
    return f"cannot be loaded ({type(error).__name__}: {first_line(error)})"


def hub_forbidden() -> str:
    """The variable that keeps the hub's libraries offline; "" where none does."""
    return next((f"${n} is set" for n in OFFLINE if os.environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE")), "")


def why_no_hub() -> str:
    """Why the hub cannot be reached from here; "" where it answers, whatever it says. Takes at most SECONDS."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    reasons = [f"{endpoint} did not answer within {SECONDS:g} s"]
    # in a thread, which nobody waits for: looking up a name has no time limit of its own
    thread = threading.Thread(target=lambda: reasons.append(_asked(endpoint)), daemon=True)
    thread.start()
    thread.join(SECONDS)
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
def quiet_hub() -> Iterator[None]:
    """Nothing below an error from the libraries, while it lasts."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    try:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
