"""The one exception family users see: it names the thing, what was expected, and what to do."""


class MoesaicError(ValueError):
    """Bad input or state that the user can mend; the message says how."""


class MissingExtraError(MoesaicError, ImportError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package!r} is not installed; this feature needs it: pip install 'moesaic[{extra}]'")
