"""Registers the checkpoint's format with transformers once both are imported, in either order.

The command line answers before transformers is loaded, which takes seconds: so `mergequant` cannot
import it. A finder on `sys.meta_path` lets the module with transformers' table of formats be
imported as it would be, registers ours behind it, and is gone.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers' table is imported, else as soon as it is."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from mergequant.evaluate.in_transformers import register

    register()


class _Finder(MetaPathFinder):
    """Finds the table's module as others do, with a loader that registers behind it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The module's own loader, and ours after it."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _register()
