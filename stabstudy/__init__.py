"""stabstudy: which recipes train stably, how spiky each is, why, and what to use. Imports nothing until it is asked."""

__version__: str


def __getattr__(name: str) -> str:
    """`stabstudy.__version__`: that of the installed package, or "none" in a checkout that is not installed."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("stabstudy")
    except PackageNotFoundError:
        return "none"
