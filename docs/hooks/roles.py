"""Docstrings name things by roles, as in ``:func:`accelrt.wrap```; the site shows them as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object

ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([^`]+)`")


class Roles(Extension):
    """Rewrites roles when a package has been read."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Called once per package."""
        self._rewrite(pkg)

    def _rewrite(self, what: Object) -> None:
        if what.docstring is not None:
            what.docstring.value = ROLE.sub(r"``\1``", what.docstring.value)
        for member in what.members.values():
            if isinstance(member, Object):  # aliases lead to what is visited elsewhere
                self._rewrite(member)
