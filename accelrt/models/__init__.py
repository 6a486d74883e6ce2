"""Model families, one description file each.

Importing this package imports every module in it, and each description registers itself:
a new family is a new file, and nothing else changes.
"""

import importlib
import pkgutil

from .family import Family, parts_of, register, supported
from .stages import Observer, Stage, execute

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Family", "Observer", "Stage", "execute", "parts_of", "register", "supported"]
