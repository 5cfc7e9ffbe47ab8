"""Starting weights of `objective.init_from`: where they are, whose they are, and the architecture that they fix.

    results/STUDY/TRIAL, results/STUDY    a finished trial that kept its final weights (of a study: its only trial)
    FOLDER                                a Hugging Face model: config.json and *.safetensors
    NAME, NAME@REVISION                   the same from the hub

Their identity is no path: the trial's id, or the sha256 of foreign weights. Of foreign models these are read: Llama and
Qwen3, into our own layers where these are the same function, and Gemma 3, into transformers' layers alone. What the
layers cannot represent is refused with the reason. Only safetensors are read, and no code that comes with a model is
ever run. Neither torch nor transformers is imported: headers and config.json are JSON.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stabstudy import store
from stabstudy.architecture import START as START
from stabstudy.architecture import foreign_family, foreign_model, foreign_shapes, whole
from stabstudy.config import ModelConfig, TrialConfig
from stabstudy.data import tokenizer
from stabstudy.data.tokenizer import HUB_NAME, hub_forbidden, quiet_hub, why_no_hub
from stabstudy.disk import file_sha256
from stabstudy.settings import DataError, show
from stabstudy.wording import first_line

FORMS = "a finished trial (results/STUDY/TRIAL), a sweep of one trial, a Hugging Face folder, or a hub name"
HUB_FILES = (
    "*.safetensors",
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "*.index.json",
)
MOST_HEADER = 100_000_000
"""Bytes of a safetensors header, as its own reader has it."""

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names that some files hold and no model needs: RoPE's frequencies follow from the settings."""


@dataclass(frozen=True)
class Weights:
    """Starting weights, and what they fix."""

    place: str  # absolute path, or the hub name: objective.init_from of a trial
    identity: str  # objective.init_id
    folder: Path  # of the files, on this machine
    model: ModelConfig  # all of it but `init`, which has no effect then
    vocab: int | None  # rows of the embedding; None: of a trial that is yet to be trained
    tokenizer: str | None  # that of the source; None: not known
    is_trial: bool


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file, as its header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte in the file
    end: int


def find(text: str, cwd: Path, family: str | None = None) -> Weights:
    """The weights of an `objective.init_from` typed in folder `cwd`; `family`: `model.family` where that is typed.

    Raises DataError in one line where there are none, or ones that no trial can start from.
    """
    path = _path(text, cwd)
    if path is not None:
        if (path / "config.json").is_file() and "trial_id" not in _json(path / "config.json"):
            return _of_folder(path, str(path), family)
        return of_trial(_trial(path))
    if text.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(text):
        raise DataError(START, f"there is nothing at this path; write {FORMS}", repr(text))
    return _of_folder(snapshot(text), text, family)


def _path(text: str, cwd: Path) -> Path | None:
    """The folder, absolute, or None where there is none. A trial may be named without trials/ in between."""
    try:
        path = cwd / Path(text).expanduser()
        between = path.parent / "trials" / path.name
        chosen = next((p for p in (path, between) if p.is_dir()), None)
        return None if chosen is None else chosen.resolve()
    except (OSError, RuntimeError, ValueError):
        return None


def _trial(path: Path) -> store.TrialFolder:
    """The trial in this folder, or the only one of the study there."""
    if (path / "config.json").is_file():
        return store.TrialFolder(path)
    trials = store.StudyFolder(path).trials()
    if len(trials) == 1:
        return trials[0]
    if not trials:
        rule = f"is neither a trial, a study nor a Hugging Face model (no config.json); write {FORMS}"
        raise DataError(START, rule, str(path))
    raise DataError(START, f"the study has {len(trials)} trials: name one of them as STUDY/TRIAL", str(path))


def of_trial(folder: store.TrialFolder) -> Weights:
    """The end of a finished trial. Raises DataError where it has none, or kept none."""
    try:
        config, state = folder.read_own()[0], folder.read_state()
    except store.StoreError as error:
        raise DataError(START, f"is not a trial to start from: {error}") from error
    if state.status != "done":
        raise DataError(START, f"the trial is not finished ({state.status})", str(folder.path))
    if state.stop_reason != "complete":
        raise DataError(START, f"the trial {state.stop_reason} at step {state.step}", str(folder.path))
    if not folder.final_weights.is_dir():
        rule = "the trial kept no final weights: remove its folder, and launch it with compute.keep_checkpoints=true"
        raise DataError(START, rule, str(folder.path))
    body = _sealed(folder)
    if body.get("trial_id") != state.trial_id or body.get("next_step") != config.train.steps:
        rule = f"the final weights are of trial {body.get('trial_id')}, step {body.get('next_step')}"
        raise DataError(START, rule, str(folder.path))
    vocab = tensors(folder.final_weights)["embed.weight"].shape[0]
    return planned(folder, state.trial_id, config.model, vocab, config.data.tokenizer)


def planned(folder: store.TrialFolder, trial_id: str, model: ModelConfig, vocab: int | None, encoder: str) -> Weights:
    """The end of a trial that may be yet to be trained."""
    own = replace(model, init=ModelConfig.init)
    return Weights(str(folder.path.absolute()), trial_id, folder.final_weights, own, vocab, encoder, True)


def _sealed(folder: store.TrialFolder) -> dict[str, Any]:
    """state.json of the final weights, whose bytes are those that were saved."""
    try:
        body = store.read_sealed(folder.final_weights / "state.json")
        same = _hash(folder.final_weights / "tensors.safetensors") == body.get("sha256")
    except (store.StoreError, OSError) as error:
        raise DataError(START, f"the final weights cannot be read ({error})") from error
    if not same:
        raise DataError(START, "the final weights were changed since they were saved", str(folder.path))
    return body


def snapshot(name: str) -> Path:
    """The folder of a hub model on this machine, downloaded where it is not there. Raises DataError."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise DataError(START, f"a hub name needs {error.name}, not installed here", show(name)) from error
    repo, _, revision = name.partition("@")
    with quiet_hub():
        try:
            return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(HUB_FILES)))
        except Exception as error:  # the library raises anything, errors of its transport too
            rule = f"cannot be downloaded ({type(error).__name__}: {first_line(error)})"
            if reason := hub_forbidden() or why_no_hub():
                rule = f"is neither a folder here nor in the hub's cache, and the hub cannot be asked ({reason})"
                rule += f"; write {FORMS}"
            raise DataError(START, rule, show(name)) from error


def _of_folder(folder: Path, place: str, family: str | None) -> Weights:
    """A Hugging Face model."""
    settings = _json(folder / "config.json")
    model = foreign_model(settings, family, str(folder))
    vocab = whole(settings, "vocab_size")
    check_names(tensors(folder), foreign_shapes(model, foreign_family(settings), vocab), model.tied)
    content = hashlib.sha256("".join(_hash(file) for file in files(folder)).encode()).hexdigest()[:16]
    has_own = place != str(folder) or any(folder.glob("tokenizer*.json"))
    return Weights(place, f"sha256:{content}", folder, model, vocab, place if has_own else None, False)


def check_names(there: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], tied: bool) -> None:
    """Raises DataError where a tensor is missing, too many, or of another shape or an unknown number format."""
    for name, shape in wanted.items():
        if name not in there:
            raise DataError(START, "a tensor of the model is not in its files", name)
        if there[name].shape != shape:
            rule = f"{name} must be {list(shape)} by config.json"
            raise DataError(START, rule, show(list(there[name].shape)))
        if there[name].dtype not in DTYPES:
            raise DataError(START, f"{name} must be one of {', '.join(DTYPES)}", there[name].dtype)
    for name in there:
        if name not in wanted and not name.endswith(IGNORED) and not (tied and name == "lm_head.weight"):
            raise DataError(START, "our layers have no place for a tensor of the model", name)


def files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in the order of their names. Raises DataError where there is none."""
    for pattern in ("model.safetensors", "model-*.safetensors", "*.safetensors"):
        if paths := sorted(p for p in folder.glob(pattern) if p.is_file()):
            return paths
    rule = "holds no *.safetensors"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        rule += ", and other formats run code when they are read (save it with save_pretrained)"
    raise DataError(START, rule, str(folder))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the folder's safetensors files, by name, from their headers. Raises DataError."""
    every: dict[str, Tensor] = {}
    for file in files(folder):
        header = _header(file)
        if twice := header.keys() & every.keys():
            raise DataError(START, "a tensor stands in two files", f"{min(twice)} in {folder}")
        every |= header
    return every


def _header(file: Path) -> dict[str, Tensor]:
    size = file.stat().st_size
    try:
        with file.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > min(size - 8, MOST_HEADER):
                raise ValueError("its header is longer than the file")
            body = json.loads(f.read(length))
        start = 8 + length
        read = {
            name: Tensor(file, t["dtype"], tuple(t["shape"]), *(start + int(at) for at in t["data_offsets"]))
            for name, t in body.items()
            if name != "__metadata__"
        }
        if any(t.end > size for t in read.values()):
            raise ValueError("it is cut off")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise DataError(START, f"cannot be read as safetensors ({first_line(error)})", str(file)) from error
    return read


def check_finite(weights: Weights) -> None:
    """Raises DataError, with the name of the tensor, where a number of the weights is not finite."""
    for name, tensor in tensors(weights.folder).items():
        if tensor.dtype not in DTYPES:
            continue
        count = (tensor.end - tensor.begin) // np.dtype(DTYPES[tensor.dtype]).itemsize
        if count == 0:
            continue
        values = np.memmap(tensor.file, DTYPES[tensor.dtype], "r", tensor.begin, (count,))
        finite = (values & 0x7F80) != 0x7F80 if tensor.dtype == "BF16" else np.isfinite(values)
        if not finite.all():
            raise DataError(START, f"{weights.place}: numbers that are not finite in a tensor", name)


def check_identity(place: str, identity: str | None, weights: Weights) -> None:
    """Raises DataError where the weights are not those that a trial was planned with."""
    if identity is not None and identity != weights.identity:
        rule = f"the weights at {place} are not those of objective.init_id ({identity})"
        raise DataError(START, rule, weights.identity)


def check(config: TrialConfig) -> None:
    """Raises DataError for starting weights of a trial that are not those of its plan, or that do not serve it."""
    place, name = config.objective.init_from, config.data.tokenizer
    if place is None:
        return
    source = find(place, Path.cwd(), config.model.family)
    check_identity(place, config.objective.init_id, source)
    _check_finite_once(source)
    if (size := _vocabulary(name)) != source.vocab:
        raise DataError(
            "data.tokenizer", f"the starting weights have a vocabulary of {source.vocab}", f"{name} with {size}"
        )


@functools.lru_cache(maxsize=8)
def _check_finite_once(source: Weights) -> None:
    check_finite(source)


@functools.lru_cache(maxsize=8)
def _vocabulary(name: str) -> int:
    return tokenizer.load(name).vocab_size


def _hash(file: Path) -> str:
    stat = file.stat()
    return _hash_once(file, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=256)
def _hash_once(file: Path, changed: int, size: int) -> str:
    return file_sha256(file)


def _json(path: Path) -> dict[str, Any]:
    try:
        return store.read_json(path)
    except store.StoreError as error:
        raise DataError(START, str(error)) from error
