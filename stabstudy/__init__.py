"""stabstudy: which recipes train stably, how spiky each is, why, and what to use. Imports nothing until it is asked."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabstudy.api import plan, run

__version__: str
__all__ = ["__version__", "plan", "run"]


def __getattr__(name: str) -> Any:
    """`run` and `plan` of `stabstudy.api`, and `__version__`, each when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        return _version()
    from stabstudy import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """That of the installed package, or "none" in a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("stabstudy")
    except PackageNotFoundError:
        return "none"
