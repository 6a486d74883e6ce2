"""Files: settings that are checked when they are read; written whole or not at all."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MOST_NESTED = 50


def read_json(path: str | Path, build: Callable[[Any], T]) -> T:
    """What ``build`` makes of the values of a JSON file.

    Raises:
        ValueError: it does not parse, or ``build`` refuses it; the message names the file.
        OSError: it cannot be read.
    """
    return read(path, parse_json, build)


def read(path: str | Path, parse: Callable[[str], Any], build: Callable[[Any], T]) -> T:
    """What ``build`` makes of what ``parse`` finds in a text file.

    Raises:
        ValueError: either of them refuses it; the message names the file.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        return build(parse(data.decode("utf-8")))
    # Nested a thousand deep, and numbers beyond a float: no settings of ours.
    except (ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(text: str) -> Any:
    """The values of a JSON text.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error


def parse_yaml(text: str) -> Any:
    """The values of a YAML text, plain ones only.

    Raises:
        ValueError: it is none, is nested too deeply (the parser's time grows with the square of
            the depth), or has aliases (a few lines of those stand for more values than memory
            holds).
    """
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"the alias *{event.anchor}; allowed: values written out")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_NESTED:
                raise ValueError(f"nested more than {MOST_NESTED} deep")
        return yaml.safe_load(text)
    # Of a value that its explicit tag does not fit, PyYAML raises what the conversion raises.
    except (
        yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(f"not valid YAML: {error}") from error


def write_text(path: str | Path, text: str) -> None:
    """:func:`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file. Whatever goes wrong, an older file of the name stays as it was.

    Args:
        path: of the file; its folder must be there. What is no regular file, such as
            ``/dev/stdout``, is written to directly.
        content: all of it.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    target = path.resolve()  # of a link the file that it leads to
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(target)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename2 is None:
            error.filename = str(path)  # of a full disk there is none, else that of the part
        raise


def write_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """:func:`write_bytes` of a picture that matplotlib draws, in the format of the suffix.

    Args:
        figure: of matplotlib.
        path: a ``.png`` or ``.svg`` file.
        dpi: dots per inch.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format=Path(path).suffix.lstrip(".") or "png")
    write_bytes(path, buffer.getvalue())
