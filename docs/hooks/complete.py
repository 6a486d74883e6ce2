"""Fails the build of the site if a public name is on no page.

A function whose module has the same name (``accelrt.wrap``) is taken for the module otherwise.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

PACKAGES = {
    "accelrt": "index", "accelrt.ops": "ops", "accelrt.steps": "steps",
    "accelrt.feedback": "feedback", "accelrt.quality": "quality",
}  # fmt: skip


def public_names(package: str) -> list[str]:
    """``__all__`` of a package, without importing it."""
    source = Path(*package.split("."), "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    return []


def on_post_build(config: Any, **_: Any) -> None:
    """Look for the anchors of all names."""
    missing = []
    for package, page in PACKAGES.items():
        folder = Path(config["site_dir"], "api", "" if page == "index" else page)
        text = (folder / "index.html").read_text(encoding="utf-8")
        for name in public_names(package):
            anchors = (f'id="{package}.{name}"', f'id="{package}.{name}.{name}"')
            if not any(anchor in text for anchor in anchors):
                missing.append(f"{package}.{name}")
    if missing:
        raise PluginError(f"on no page of the API: {', '.join(missing)}")
