"""What serving needs beyond the core, and a clear word where it is missing."""

from importlib.util import find_spec

from moesaic.errors import MoesaicError


def needed(*modules: str, extra: str = "serve") -> None:
    """Raises MoesaicError, naming the extra, if one of the modules is not installed."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise MoesaicError(f"this needs {', '.join(missing)}: pip install 'moesaic[{extra}]'")
