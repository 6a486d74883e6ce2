"""Config: validation, dict and file round trips."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from accelrt import Config


def test_defaults_round_trip() -> None:
    config = Config()
    assert Config.from_dict(config.to_dict()) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(Config)}
    json.dumps(config.to_dict())


WRONG: list[tuple[str, Any, str]] = [
    ("frames_per_slice", 0, "an integer >= 1, or None"),
    ("frames_per_slice", 1.5, "an integer >= 1, or None"),
    ("pixels_per_slice", -3, "an integer >= 1, or None"),
    ("ff_rows", "many", "an integer >= 1, or None"),
    ("samples_per_slice", True, "an integer >= 1, or None"),
    ("vae_images", 0, "an integer >= 1, or None"),
    ("slice_mib", 0, "a number above 0"),
    ("slice_mib", float("nan"), "a number above 0"),
    ("slice_mib", "8", "a number above 0"),
    ("slice_mib", 1e6, "below 1e6"),
    ("samples_per_pass", 0, "an integer >= 1, or None"),
    ("memory_budget", "much", "memory_budget"),
    ("recompute", "sometimes", "allow, never, always"),
    ("cuda_graphs", 1, "True, False, 'auto'"),
    ("max_cuda_graphs", 0, "an integer >= 1"),
    ("bands", "yes", "True, False"),
    ("pipeline_slices", None, "True, False"),
    ("inplace", 1, "True, False"),
    ("fuse", None, "True, False"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG)
def test_wrong_values_name_key_value_and_range(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError) as error:
        Config.from_dict({key: value})
    for part in (key, repr(value), allowed):
        assert part in str(error.value)


def test_every_setting_has_a_wrong_value_that_is_refused() -> None:
    assert {key for key, _, _ in WRONG} == {field.name for field in dataclasses.fields(Config)}


def test_unknown_keys_are_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown setting frame, speed; known: frames_per_slice"):
        Config.from_dict({"speed": 1, "frame": 2, "ff_rows": 3})
    with pytest.raises(ValueError, match="unknown setting speed"):
        Config().override(speed=1)
    with pytest.raises(ValueError, match="list"):
        Config.from_dict([1])  # type: ignore[arg-type]


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().ff_rows = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "frames_per_slice: 2\nfuse: false\n"),
        ("a.yml", "frames_per_slice: 2\nfuse: false\n"),
        ("a.JSON", '{"frames_per_slice": 2, "fuse": false}'),
    ],
)
def test_from_file(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert Config.from_file(path) == Config(frames_per_slice=2, fuse=False)
    assert Config.from_file(str(path)) == Config(frames_per_slice=2, fuse=False)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "x = 1", r"suffix is '.toml'; allowed: .yaml, .yml, .json"),
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "a: [1", "not valid YAML"),
        ("a.yaml", "ff_rows: 0", r"a\.yaml: ff_rows is 0"),
        ("a.yaml", "nothing: 0", "unknown setting nothing"),
        ("a.yaml", "- 1", "list"),
    ],
)
def test_from_bad_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Config.from_file(path)


def test_an_empty_file_means_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    assert Config.from_file(tmp_path / "a.yaml") == Config()


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Config.from_file(tmp_path / "none.yaml")
