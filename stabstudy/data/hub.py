"""Text from the Hugging Face hub, or from a local folder laid out like a hub dataset, through `datasets`, streaming.

No dataset's own code ever runs: `datasets` 4 removed that ability, and older versions are refused. Nothing trains from
the stream: it is read once, in its order, into the token cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stabstudy import extras
from stabstudy.config import DataConfig
from stabstudy.data import files, network
from stabstudy.data.edits import Memory
from stabstudy.data.errors import DataError, first_line
from stabstudy.data.rows import RowCount, text_or_reason


def documents(config: DataConfig, count: RowCount) -> Iterator[str]:
    """The rows' text in the dataset's order. Raises DataError naming dataset and row."""
    check(config)
    from datasets.exceptions import DatasetsError

    try:
        for number, row in enumerate(_rows(config), start=1):
            count.rows += 1
            text, reason = text_or_reason(row, (config.text_column,))
            if reason:
                count.skip(f"{config.path}: row {number}", reason)
            else:
                yield text
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError("data.path", _explained(error), str(config.path)) from error


def identity(config: DataConfig, memory: Memory | None = None) -> dict[str, Any]:
    """What the dataset is: a local folder's content, else repository, configuration, split, revision and column."""
    named = {"config": config.hub_config, "split": config.hub_split, "column": config.text_column}
    root = Path(config.path or "").expanduser()
    if root.is_dir():
        content = files.digest(files.walk(root, lambda path: True), memory, config.max_bytes is not None)
        return named | {"content": content}
    return named | {"repo": config.path, "revision": config.hub_revision}


def check(config: DataConfig) -> None:
    """Raises DataError if `datasets` is missing or could run a dataset's code. Reaches no network."""
    if reasons := extras.why_not(["datasets"]):
        raise DataError(
            "data.source",
            f"{reasons[0]} (older ones can run a dataset's own code; a local copy goes by source parquet or jsonl)",
            "hf",
        )


def _rows(config: DataConfig) -> Iterator[Any]:
    import datasets

    is_local = Path(config.path or "").expanduser().exists()
    if not is_local and not network.forbidden() and (absent := network.why_not()):
        rule = (
            f"is not here, and the hub cannot be reached ({absent}); HF_HUB_OFFLINE=1 reads what was downloaded before"
        )
        raise DataError("data.path", rule, str(config.path))
    stream = datasets.load_dataset(
        str(Path(config.path or "").expanduser()),
        name=config.hub_config,
        split=config.hub_split,
        revision=config.hub_revision,
        streaming=True,
    )
    if stream.column_names and config.text_column not in stream.column_names:
        names = ", ".join(stream.column_names)
        raise DataError("data.text_column", f"{config.path} has only the columns {names}", config.text_column)
    yield from stream


def _explained(error: Exception) -> str:
    said = first_line(error)
    if "script" in said.lower():
        return f"wants to run code of its own, which is never run ({said})"
    return f"cannot be read as a dataset ({type(error).__name__}: {said})"
