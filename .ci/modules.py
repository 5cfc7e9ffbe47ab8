"""The list of modules in docs/modules.md, written from their first lines.

python .ci/modules.py           writes it
python .ci/modules.py --check   exits with 1 where the page is not what would be written
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "modules.md"
FOLDERS = ("stabstudy", "benchmarks", ".ci")
HEAD = """\
# Modules

Every module with its first line, written by `python .ci/modules.py`. The tour of the code is in
[CONTRIBUTING.md](../CONTRIBUTING.md).
"""


def page(root: Path) -> str:
    """The page on the tree below `root`. Raises ValueError for a module without a first line."""
    return "\n".join([HEAD, *(line for folder in FOLDERS for line in _folder(root / folder, root))])


def _folder(folder: Path, root: Path) -> Iterator[str]:
    """The table of a folder's modules, then those of its packages."""
    modules = [path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    package = folder / "__init__.py"
    lead = f"{_first_line(package)}.\n\n" if package.exists() else ""
    yield f"## {folder.relative_to(root)}/\n\n{lead}| module | |\n|---|---|"
    yield from (f"| `{path.name}` | {_first_line(path)} |" for path in modules)
    yield ""
    for inner in sorted(path for path in folder.iterdir() if (path / "__init__.py").exists()):
        yield from _folder(inner, root)


def _first_line(path: Path) -> str:
    """The first sentence line of a module's docstring, without its full stop, safe in a table."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not doc:
        raise ValueError(f"{path}: a module begins with a line that says what it provides")
    return doc.splitlines()[0].removesuffix(".").replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Write the page, or check it."""
    after = page(ROOT)
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(after, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != after:
        print(f"{PAGE.name} is not what the modules say: run python .ci/modules.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
