"""Attributes of a package that are imported at their first use."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any


def attributes(
    package: str, names: Mapping[str, str] = MappingProxyType({})
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562).

    Its submodules are attributes too, whether or not something has imported them. A name that is
    also a submodule's must stand for it: whoever imports that sets the attribute to the module.

    Args:
        package: its ``__name__``.
        names: the module that has each attribute.
    """
    module = sys.modules[package]

    def submodules() -> list[str]:
        found = (item.name for item in pkgutil.iter_modules(module.__path__))
        return [name for name in found if not name.startswith("_")]

    def __getattr__(name: str) -> Any:
        if name in names:
            value = getattr(importlib.import_module(names[name]), name)
        elif not name.startswith("_") and name in submodules():
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(module, name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(module), *names, *submodules()})

    return __getattr__, __dir__
