"""What Python repeats of csrc/: read from the sources, and compared."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from accelrt.groups import attention as recognised
from accelrt.planning import resident

CSRC = Path(__file__).resolve().parent.parent / "csrc"
CONV2D = "kernels/conv2d/conv2d.h"
LINEAR = "kernels/linear/linear.h"
FEED_FORWARD = "blocks/feed_forward.h"
TEMPORAL = "kernels/temporal_attention/temporal_attention.h"
UNITS = {"KiB": 2**10, "MiB": 2**20}
# In the package their names are those of the operators.
attention, feed_forward, linear, weighted_sum = (
    import_module(f"accelrt.ops.{name}")
    for name in ("attention", "feed_forward", "linear", "weighted_sum")
)


def text_of(path: str) -> str:
    return (CSRC / path).read_text(encoding="utf-8")


def constants(*paths: str) -> dict[str, int]:
    """The whole-number ``constexpr`` of some files; later ones may use those before."""
    known: dict[str, int] = {}
    for path in paths:
        for name, value in re.findall(r"constexpr int(?:64_t)? (k\w+) = ([^;]+);", text_of(path)):
            plain = re.sub(r"int64_t\{(\d+)\}", r"\1", value)
            try:
                tree = ast.parse(plain.replace("/", "//"), mode="eval")
            except SyntaxError:
                continue
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            if names <= known.keys():
                known[name] = eval(compile(tree, path, "eval"), {"__builtins__": {}}, dict(known))
    return known


def enumerators(path: str, enum: str) -> list[tuple[str, int]]:
    """Names and values of an ``enum class``."""
    body = re.search(rf"enum class {enum} : int \{{([^}}]*)\}}", text_of(path))
    assert body is not None, f"{path} has no enum {enum}"
    return [(name, int(value)) for name, value in re.findall(r"k(\w+) = (\d+)", body[1])]


def stated(path: str, pattern: str) -> int:
    """Bytes that the comment of a header promises, where ``#`` in ``pattern`` is their number."""
    words = re.sub(r"\s*\n// ", " ", text_of(path))
    found = re.search(pattern.replace("#", r"(\d+) (KiB|MiB)"), words)
    assert found is not None, f"{path} does not say: {pattern}"
    return int(found[1]) * UNITS[found[2]]


def test_what_a_convolution_of_ours_takes() -> None:
    header = constants(CONV2D)
    assert header["kConv2dTileBytes"] == resident.TILE_BYTES
    assert header["kConv2dPackBytes"] == resident.PACK_BYTES
    assert stated(CONV2D, "below # whatever the weight") == resident.BESIDE_TILE_BYTES
    text = re.sub(r"\s*\n// ", " ", text_of(CONV2D))
    assert "With tile registers, for bfloat16: copies of a tile, twice kConv2dTileBytes" in text
    # With tile registers a plan counts twice what lies beside a tile.
    assert stated(CONV2D, "below # of sums") <= 2 * resident.BESIDE_TILE_BYTES


def test_panels_of_the_tile_registers() -> None:
    tiles = constants("include/accelrt/tiles.h", "include/accelrt/tile_block.h")
    assert tiles["kBlockColumns"] == resident.PANEL_CHANNELS
    assert tiles["kTileDepth"] == resident.PANEL_CHANNELS  # to which channels are padded
    panel = re.search(
        r"int64_t panel\(\) const \{ return ([^;]+);", text_of("kernels/conv2d/conv2d_tiles.cpp")
    )
    assert panel is not None
    assert panel[1] == "taps * channels / 2 * kBlockColumns"  # words, of two elements


def test_what_a_linear_layer_takes_with_tile_registers() -> None:
    header = constants(LINEAR)
    assert header["kLinearRowsBytes"] == resident.LINEAR_ROWS_BYTES
    assert header["kLinearPackBytes"] == resident.LINEAR_PACK_BYTES
    assert stated(LINEAR, "below # of sums") == resident.LINEAR_SUMS_BYTES
    source = "kernels/linear/linear_tiles.cpp"
    tiles = constants("include/accelrt/tiles.h", "include/accelrt/tile_block.h", source)
    assert tiles["kChunkBytes"] == resident.LINEAR_CHUNK_BYTES
    assert tiles["kFewestRows"] == resident.LINEAR_CHUNK_ROWS
    assert tiles["kFewRows"] == resident.LINEAR_FEW_ROWS
    assert tiles["kPanels"] == resident.LINEAR_PANELS
    assert tiles["kLine"] == resident.PANEL_CHANNELS  # a row has a line more at most
    assert f"p.rows > fit ? {resident.LINEAR_FEWEST_PIECES} : " in text_of(source)
    # Two blocks that are done, and those that wait; a chunk is in whole tiles of rows.
    sums = tiles["kSumsBytes"] + 2 * 4 * tiles["kBlockSums"]
    row = resident.LINEAR_CHUNK_BYTES // tiles["kFewestRows"]
    assert sums + (tiles["kTileRows"] - 1) * row <= resident.LINEAR_SUMS_BYTES
    assert "int64_t panel() const { return depth / 2 * kBlockColumns; }" in text_of(source)


@pytest.mark.parametrize(
    ("path", "name", "python"),
    [
        ("kernels/attention/attention.h", "kMaxAttentionDim", attention.MAX_HEAD_DIM),
        (TEMPORAL, "kMaxHeadDim", recognised.MAX_HEAD_DIM),
        (TEMPORAL, "kMaxFrames", recognised.MAX_FRAMES),
        (TEMPORAL, "kMaxFrames", attention.MAX_FRAMES),
        ("kernels/weighted_sum/weighted_sum.h", "kWeightedSumMaxSlots", weighted_sum.MAX_SLOTS),
    ],
)
def test_limits(path: str, name: str, python: int) -> None:
    assert constants(path)[name] == python


@pytest.mark.parametrize(
    ("path", "enum", "codes"),
    [
        (LINEAR, "LinearEpilogue", linear._ACTIVATIONS),
        (FEED_FORWARD, "HiddenActivation", feed_forward.ACTIVATIONS),
    ],
    ids=["linear", "feed_forward"],
)
def test_codes_of_activations(path: str, enum: str, codes: dict[Any, int]) -> None:
    """They are called as in C++, but for the case; no activation is ``None``."""
    names = {name.replace("Tanh", "_Tanh").lower(): code for name, code in enumerators(path, enum)}
    assert {name or "none": code for name, code in codes.items()}.items() <= names.items()
