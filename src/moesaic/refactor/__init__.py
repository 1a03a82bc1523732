"""From a dense model to a refactored one with receipts: the stages, and `moesaic.refactor(...)`, which runs them all.

The package has the name of its main function. Importing any module in it would hide a function `moesaic.refactor`
behind the package, so the package itself can be called.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.refactor.api import Refactored


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> "Refactored":
        """See `moesaic.refactor.api.refactor`."""
        from moesaic.refactor.api import refactor

        return refactor(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
