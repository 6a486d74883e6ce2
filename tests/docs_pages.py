"""Runs the Python blocks of a Markdown page, top to bottom, in one namespace.

A block that cannot run here has ``<!-- not run: reason -->`` in the line above its fence. A
``text`` block directly after a Python block is what that one prints.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*) -->\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A Python block.

    Args:
        code: its text.
        line: lines of the page above it.
        reason: why it is not run; empty if it is.
        shown: what the page says that it prints, if it does.
    """

    code: str
    line: int
    reason: str
    shown: str | None


def pages() -> list[Path]:
    """The READMEs and the guides, where they have Python blocks."""
    found = [
        ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "examples").glob("*/README.md")),
    ]  # fmt: skip
    return [page for page in found if "```python\n" in page.read_text(encoding="utf-8")]


def blocks(page: Path) -> list[Block]:
    """The Python blocks of a page."""
    text = page.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    assert 2 * len(fences) == len(re.findall(r"^ *```", text, re.MULTILINE)), "an odd fence"
    found = []
    for index, fence in enumerate(fences):
        if fence["kind"] != "python":
            continue
        following = fences[index + 1] if index + 1 < len(fences) else None
        shown = following["code"] if following and following["kind"] == "text" else None
        line = text.count("\n", 0, fence.start("code"))
        found.append(Block(fence["code"], line, fence["reason"] or "", shown))
    return found


def run(page: Path, names: dict[str, Any]) -> Iterator[tuple[int, Block]]:
    """Run the blocks of a page; names that they define end in ``names``.

    Args:
        page: a Markdown file.
        names: what the blocks find defined; may be changed between them.

    Yields:
        Each block's number, before it runs.

    Raises:
        AssertionError: a block prints something else than the page shows.
    """
    for number, block in enumerate(blocks(page)):
        if block.reason:
            continue
        yield number, block
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        if block.shown is not None:
            printed = [line.rstrip() for line in out.getvalue().splitlines()]
            assert printed == block.shown.splitlines()
