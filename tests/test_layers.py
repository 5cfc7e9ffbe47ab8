"""The house's rules, read from the code itself: who may import whom, what loads late, what is never used at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FACTS = {
    *("extras", "failpoints", "settings", "wording", "progress_line", "architecture", "task", "config", "shape"),
    *("expressions", "space"),
    *("trace", "live", "finished", "disk", "state", "store", "tailing", "external"),
}


@dataclass(frozen=True)
class May:
    """What a part of the package may import: parts of its own package, other packages, and which of them only late.

    `late`: imported inside a function, so that importing the module stays cheap and works without them.
    """

    parts: set[str]
    packages: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)


# Data flows one way: facts | stability, data | training, analysis, planning | sweeping, report, ingest | sweep.
MAY = {
    "__init__": May({"api"}, late={"api"}),
    "extras": May(set()),
    "failpoints": May(set()),
    "settings": May(set()),
    "wording": May({"settings"}, {"rich"}, late={"rich"}),
    "progress_line": May({"settings", "wording"}, {"rich"}, late={"rich"}),
    "architecture": May({"settings"}),
    "task": May({"settings"}),
    "config": May({"settings", "architecture", "task"}),
    "shape": May({"config"}),
    "expressions": May({"config", "settings"}),
    "space": May({"config", "expressions"}),
    "trace": May(set(), {"numpy", "pandas"}, late={"pandas"}),  # for `frame` alone
    "encodings": May({"trace", "disk"}, {"numpy"}),
    "live": May({"trace", "encodings", "disk", "failpoints"}, {"numpy"}),
    "finished": May({"trace", "live", "disk", "wording"}, {"numpy", "pyarrow"}, late={"pyarrow"}),
    "disk": May({"failpoints"}),
    "state": May({"config", "disk"}),
    "store": May({"config", "settings", "disk", "state", "trace", "finished", "live"}),
    "tailing": May({"disk", "store"}),
    # what a config.json says of a run trained elsewhere: ingesting writes it, analysis reads it
    "external": May({"settings", "config", "store"}),
    "stability": May({"trace", "config", "state", "store", "wording"}, {"numpy", "scipy"}, late={"scipy"}),
    "data": May(
        {"extras", "architecture", "config", "settings", "disk", "store", "wording"},
        {"numpy", "pyarrow", "tokenizers", "transformers", "huggingface_hub", "datasets", "zstandard", "jinja2"},
        late={"pyarrow", "tokenizers", "transformers", "huggingface_hub", "datasets", "zstandard", "jinja2"},
    ),
    "training": May(FACTS | {"stability", "data"}, {"numpy", "torch", "safetensors", "transformers"}),
    # data for one question alone: what a step read
    "analysis": May(
        FACTS | {"stability", "data"},
        {
            "numpy",
            "pandas",
            "pyarrow",
            "scipy",
            "matplotlib",
            "jinja2",
            "markupsafe",
            "statsmodels",
            "optuna",
            "loky",
            "yaml",
        },
        late={"data", "statsmodels", "optuna", "loky", "yaml"},
    ),
    "planning": May(FACTS | {"data", "stability"}, {"numpy", "hydra", "omegaconf", "yaml", "rich"}),
    # the boundary and the history of a search are analysis, which the report shows too
    "search": May(FACTS | {"stability", "planning", "analysis"}, {"numpy", "optuna"}, late={"optuna"}),
    "sweeping": May(
        FACTS | {"cli", "stability", "data", "planning", "search", "training"},
        {"numpy", "rich", "ray", "optuna", "IPython"},
        late={"ray", "optuna", "training", "IPython"},
    ),
    # foreign files to trials; YAML is read as suspiciously as our own, by planning's reader
    "ingesting": May(
        FACTS | {"planning"}, {"numpy", "pyarrow", "tensorboard"}, late={"planning", "pyarrow", "tensorboard"}
    ),
    # trials to trackers, each of which is there or not
    "exporting": May(FACTS | {"stability"}, {"numpy", "tensorboard", "wandb"}, late={"tensorboard", "wandb"}),
    "cli": May({"settings", "state"}, late={"state"}),  # it loads the commands by name, late
    "report": May(FACTS | {"cli", "analysis"}, late={"analysis"}),
    "ingest": May(FACTS | {"cli", "ingesting"}, late=FACTS | {"ingesting"}),
    "export": May(FACTS | {"cli", "exporting"}, late={"exporting"}),
    "api": May(
        FACTS | {"cli", "planning", "search", "sweeping", "analysis", "report"},
        {"rich"},
        late=FACTS | {"cli", "planning", "search", "sweeping", "analysis", "report", "rich"},
    ),
    "sweep": May(
        FACTS | {"cli", "api", "planning", "sweeping", "report"}, late=FACTS | {"planning", "sweeping", "report"}
    ),
}

EXECUTES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
"""Modules that run what they read."""

FORBIDDEN_CALLS = {
    "torch.load": "unpickles",
    "torch.hub.load": "runs code from a network",
    "read_pickle": "unpickles",
    "to_pickle": "pickles",
    "instantiate": "calls what a configuration names",
    "unsafe_load": "builds any object",
    "full_load": "builds objects",
    "os.system": "is a shell",
    "eval": "runs text",
    "exec": "runs text",
}
FORBIDDEN_ARGUMENTS = {("allow_pickle", True), ("trust_remote_code", True), ("shell", True)}


def breaches(package: Path) -> list[str]:
    """Every breach in the package folder: 'stability/spikes.py:3: imports torch'."""
    found = []
    for path in sorted(package.rglob("*.py")):
        where, tree = path.relative_to(package), ast.parse(path.read_text())
        part = where.parts[0].removesuffix(".py")
        found += [f"{where}:{line}: {what}" for line, what in (*_imports(tree, part, package.name), *_calls(tree))]
    return found


def _imports(tree: ast.Module, part: str, own: str) -> Iterator[tuple[int, str]]:
    if part not in MAY:
        yield 1, f"{part} is not in the table of who may import whom"
        return
    may, early = MAY[part], set(_loaded_at_once(tree))
    for node in ast.walk(tree):
        for target in _targets(node, own):
            kind, _, name = target.partition(":")
            if name in EXECUTES:
                yield node.lineno, f"imports {name}, which runs what it reads"  # type: ignore[attr-defined]
            elif kind == "part" and name not in may.parts | {part, "__init__"}:
                yield node.lineno, f"imports {own}.{name}"  # type: ignore[attr-defined]
            elif kind == "package" and name not in may.packages | sys.stdlib_module_names:
                yield node.lineno, f"imports {name}"  # type: ignore[attr-defined]
            elif name in may.late and node in early:
                yield node.lineno, f"imports {name} when it is loaded, not inside a function"  # type: ignore[attr-defined]


def _targets(node: ast.AST, own: str) -> list[str]:
    """'part:NAME' for each part of our own package that the statement imports, 'package:NAME' for each other one."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "relative imports hide where a name comes from"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    split = [name.split(".") for name in names]
    return [f"part:{p[1] if len(p) > 1 else '__init__'}" if p[0] == own else f"package:{p[0]}" for p in split]


def _loaded_at_once(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when the module is imported: not those in functions, nor for type checkers alone."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def _calls(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        for forbidden, why in FORBIDDEN_CALLS.items():
            # the builtin eval is forbidden, model.eval() is not
            if name == forbidden or (name.endswith(f".{forbidden}") and forbidden not in ("eval", "exec")):
                yield node.lineno, f"calls {name}, which {why}"
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in FORBIDDEN_ARGUMENTS:
                yield node.lineno, f"passes {keyword.arg}={value}"


def test_nobody_imports_who_it_may_not():
    assert breaches(ROOT / "stabstudy") == []


PLANTED = {
    "config.py": ("import numpy", "config.py:1: imports numpy"),
    "stability/x.py": ("from stabstudy import shape", "stability/x.py:1: imports stabstudy.shape"),
    "data/x.py": ("def f():\n    import torch", "data/x.py:2: imports torch"),
    "data/y.py": ("import transformers", "data/y.py:1: imports transformers when it is loaded, not inside a function"),
    "training/x.py": ("import ray", "training/x.py:1: imports ray"),
    "training/y.py": ("from stabstudy.planning.plan import Plan", "training/y.py:1: imports stabstudy.planning"),
    "analysis/x.py": ("import torch.nn as nn", "analysis/x.py:1: imports torch"),
    "sweeping/x.py": (
        "try:\n    import ray\nfinally: pass",
        "sweeping/x.py:2: imports ray when it is loaded, not inside a function",
    ),
    "sweeping/y.py": (
        "class A:\n    import torch",
        "sweeping/y.py:2: imports torch",
    ),
    "sweep.py": ("from stabstudy import config", "sweep.py:1: imports config when it is loaded, not inside a function"),
    "store.py": ("import pickle as p", "store.py:1: imports pickle, which runs what it reads"),
    "trace.py": ("np.load(f, allow_pickle=True)", "trace.py:1: passes allow_pickle=True"),
    "report.py": ("x = torch.load(f)", "report.py:1: calls torch.load, which unpickles"),
    "ingest.py": ("eval('1')", "ingest.py:1: calls eval, which runs text"),
    "helpers.py": ("", "helpers.py:1: helpers is not in the table of who may import whom"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_checker_finds_a_planted_breach(name: str, tmp_path: Path):
    code, breach = PLANTED[name]
    path = tmp_path / "stabstudy" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    assert breaches(tmp_path / "stabstudy") == [breach]


@pytest.mark.parametrize(
    "code",
    ["def f():\n    import ray", "from __future__ import annotations\nimport os, json", "model.eval()",
     "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray"],
)  # fmt: skip
def test_the_checker_lets_the_rest_pass(code: str, tmp_path: Path):
    path = tmp_path / "stabstudy" / "sweeping" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert breaches(tmp_path / "stabstudy") == []


def blocked(modules: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run the code in a process where importing any of these modules fails."""
    hide = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {sorted(modules)!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, check=False)


def modules_of(part: str) -> list[str]:
    """Every module of a part, those of its own packages too."""
    paths = sorted((ROOT / "stabstudy" / part).rglob("*.py"))
    return [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths if p.stem != "__init__"]


@pytest.mark.parametrize(
    ("part", "absent"),
    [
        ("training", {"ray", "hydra", "omegaconf", "optuna", "pandas", "matplotlib", "jinja2", "rich", "transformers"}),
        ("analysis", {"torch", "ray", "hydra", "omegaconf", "optuna", "transformers", "safetensors", "rich"}),
        ("data", {"torch", "ray", "hydra", "pandas", "datasets", "transformers", "tokenizers", "zstandard", "pyarrow"}),
        ("stability", {"torch", "ray", "hydra", "pandas", "pyarrow", "matplotlib", "scipy"}),
        ("planning", {"torch", "ray", "optuna", "pandas", "matplotlib", "transformers", "datasets"}),
        ("sweeping", {"torch", "ray", "optuna", "pandas", "matplotlib", "transformers", "datasets"}),
        ("exporting", {"torch", "ray", "hydra", "pandas", "pyarrow", "tensorboard", "wandb", "scipy"}),
        ("ingesting", {"torch", "ray", "hydra", "omegaconf", "pandas", "pyarrow", "tensorboard", "transformers"}),
    ],
)
def test_each_part_loads_without_what_it_may_not_need(part: str, absent: set[str]):
    done = blocked(absent, f"import {', '.join(modules_of(part))}")
    assert done.returncode == 0, done.stderr


def test_the_block_works():
    assert "ModuleNotFoundError: torch" in blocked({"torch"}, "import stabstudy.training.model").stderr


# the house style that a machine can check


def sources() -> list[Path]:
    return sorted((ROOT / "stabstudy").rglob("*.py"))


MOST_MODULES = 208


def test_modules_are_few():
    assert len(sources()) <= MOST_MODULES


def test_modules_are_small():
    """Size is a smell, not a law, but beyond these something has to be split, or two things are one."""
    sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources()}
    assert not {name: size for name, size in sizes.items() if size > 400}
    assert sorted(sizes.values())[len(sizes) // 2] < 260


MOST_LINES_OF_SCRIPT = 554


def test_the_pages_scripts_are_short():
    """What plotly, HTML, the style sheet or Python can do is theirs; and a script is read, so its lines are too."""
    lines = [
        line
        for path in (ROOT / "stabstudy/analysis/report/templates").glob("*.js")
        for line in path.read_text().splitlines()
    ]
    assert 0 < len(lines) <= MOST_LINES_OF_SCRIPT and max(map(len, lines)) <= 120


def test_no_module_name_stands_twice():
    names = [p.stem for p in sources() if p.stem != "__init__"]
    assert not {name for name in names if names.count(name) > 1}


def test_first_lines_are_noun_phrases_of_one_line():
    """What a module provides, in one line: docs/modules.md is made of them."""
    lines = {p: (ast.get_docstring(ast.parse(p.read_text())) or "").partition("\n")[0] for p in sources()}
    riddles = ("What", "Where", "How", "Which", "Whether", "Who", "When", "Why")
    assert not {str(p): line for p, line in lines.items() if not line.endswith(".") or line.split()[0] in riddles}


def test_no_module_is_named_after_nothing():
    assert not {p.stem for p in sources()} & {"utils", "util", "common", "helpers", "misc", "base", "core"}


@pytest.mark.parametrize("command", ["sweep", "report", "ingest", "export"])
def test_commands_define_no_class(command: str):
    """Run by -m they are `__main__`: a class defined there has a second identity."""
    path = ROOT / "stabstudy" / f"{command}.py"
    if path.exists():
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
