"""JSON files that are validated when they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_json(path: str | Path, build: Callable[[Any], T]) -> T:
    """What ``build`` makes of the values of a JSON file.

    Raises:
        ValueError: it does not parse, or ``build`` refuses it; the message names the file.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        return build(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
