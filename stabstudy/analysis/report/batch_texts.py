"""The text that a trial read at its highest spikes, to be printed on its page."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from stabstudy.analysis import words
from stabstudy.analysis.elements import Block, Code, Text
from stabstudy.analysis.shared_batches import kept_sequences
from stabstudy.analysis.study import Study
from stabstudy.settings import DataError
from stabstudy.store import StoreError

MOST_SPIKES = 2
"""Spikes of the norm whose batches are printed: those of the largest peak over recent level."""

MOST_CHARACTERS = 1_500
"""Of one batch, dealt out evenly to its sequences ..."""

LEAST_CHARACTERS = 100
"""... so long as each gets this many; of more sequences the first are printed."""

_PICTURES = {ord("\n"): "↵", ord("\t"): "→", 0x7F: "␡"} | {c: chr(0x2400 + c) for c in range(32) if c not in (9, 10)}
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def batch_texts(study: Study, trial_id: str, printed: bool) -> Iterator[Block]:
    """The batches of the highest spikes of the norm, else that of the largest norm; nothing of a run trained elsewhere.

    `printed`: their text too, not only how to read it. It comes from the token cache alone: no data are tokenized, and
    nothing is asked of a network.
    """
    if study.ingested:
        return
    for step, which in _steps(study, trial_id):
        if printed:
            yield _printed(study, trial_id, step, which)
        lines = ("from stabstudy.analysis.study import Study", f'{words.load(study.name)}.batch("{trial_id}", {step})')
        title = f"All of the batch at step {step}" if printed else f"The text of the batch at step {step}, {which}"
        yield Code(f"{title}: in Python", "\n".join(lines))


def _steps(study: Study, trial_id: str) -> list[tuple[int, str]]:
    """The steps whose batches are asked for, each with what it was."""
    own = [s for s in study.spikes_by_trial.get(trial_id, []) if s["series"] == "grad"]
    own.sort(key=lambda s: (-s["peak_ratio"], s["start"]))
    names = ("the highest spike of the gradient norm", "the second highest spike")
    if steps := [(s["peak_step"], name) for s, name in zip(own[:MOST_SPIKES], names, strict=False)]:
        return steps
    row = study.row(trial_id)
    largest = row["grad_norm_argmax"]
    return [(largest, "the largest gradient norm")] if row["verdict"] not in (None, "stable") and largest else []


def _printed(study: Study, trial_id: str, step: int, which: str) -> Block:
    try:
        owner, own = study.owner(trial_id)
        sequences = kept_sequences(owner.folder.trial(own), step)
    except DataError as error:  # without its value, which may be a path of this machine
        reason = f"{error.problem.setting} {error.problem.rule}"
        return Text(f"The text of step {step}, {which}, is not available here: {words.clean(reason, 200)}.")
    except (StoreError, ValueError, OSError) as error:
        return Text(f"The text of step {step}, {which}, is not available here ({type(error).__name__}).")
    count = words.count(len(sequences), "sequence")
    return Code(f"What it read at step {step}, {which}: {count}", shortened(sequences), shown=True)


def shortened(sequences: Sequence[tuple[int, str]]) -> str:
    """The sequences, each with its first document, a line each, as long as there is room; nothing in them is hidden."""
    each = max(LEAST_CHARACTERS, MOST_CHARACTERS // max(1, len(sequences)))
    shown = sequences[: max(1, MOST_CHARACTERS // each)]
    lines = [f"{i}. document {document}: {_cut(text, each)}" for i, (document, text) in enumerate(shown, start=1)]
    rest = len(sequences) - len(shown)
    return "\n".join([*lines, *([f"... and {words.count(rest, 'more sequence')}"] if rest else [])])


def _cut(text: str, most: int) -> str:
    rest = len(text) - most
    return visible(text) if rest <= 0 else f"{visible(text[:most])} ... and {words.count(rest, 'more character')}"


def visible(text: str) -> str:
    """The text with a sign or a number in place of each character that could not be seen, or would change the line."""
    signs = (_PICTURES.get(ord(c)) or (f"\\u{ord(c):04x}" if unicodedata.category(c) in _HIDDEN else c) for c in text)
    return "".join(signs)
