"""A pipeline or model in a folder, without its weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from accelrt.errors import UnsupportedModelError
from accelrt.files import read_json


def from_folder(path: Path, dtype: torch.dtype) -> Any:
    """What :func:`accelrt.plan` takes, from the configurations alone.

    Args:
        path: a folder as ``save_pretrained`` of a pipeline or of a model writes it.
        dtype: of the weights.

    Returns:
        A model on the meta device, or an object with the ``components`` of the pipeline.

    Raises:
        UnsupportedModelError: the folder is neither, or names a class that is not known.
        ValueError: a configuration does not parse; the message names the file.
        OSError: a configuration is missing.
    """
    import diffusers

    index, single = path / "model_index.json", path / "config.json"
    if index.is_file():
        values = read_json(index, _mapping)
        components: dict[str, Any] = {}
        for name, entry in values.items():
            if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
                if Path(name).name != name or not all(isinstance(part, str) for part in entry):
                    raise UnsupportedModelError(f"{index}: {name!r} is no component")
                component = _component(path / name, *entry)
                if component is not None:
                    components[name] = _cast(component, dtype)
        if not components:
            raise UnsupportedModelError(
                f"{index} names no model that diffusers or transformers has"
            )
        pipeline = getattr(diffusers, str(values.get("_class_name", "")), None)
        image = (
            isinstance(pipeline, type)
            and "image" in inspect.signature(pipeline.__call__).parameters
        )
        return SimpleNamespace(components=components, takes_image=image, **components)
    if single.is_file():
        name = str(read_json(single, _mapping).get("_class_name", ""))
        model = _component(path, "diffusers", name)
        if model is not None:
            return _cast(model, dtype)
    raise UnsupportedModelError(f"{path} holds neither a pipeline nor a model of diffusers")


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UnsupportedModelError(f"a mapping was expected; got {type(values).__name__}")
    return values


def _component(path: Path, library: str, name: str) -> Any:
    """A model on the meta device, or ``None`` for what has no weights."""
    import diffusers

    if library == "diffusers":
        cls = getattr(diffusers, name, None)
        if cls is None:
            raise UnsupportedModelError(f"{path} is of a class that diffusers lacks: {name}")
        if not isinstance(cls, type) or not issubclass(cls, nn.Module):
            return None
        # A folder that is not there would be looked for on the hub.
        settings = read_json(path / "config.json", _mapping)
        with torch.device("meta"):
            return cls.from_config(settings)  # type: ignore[attr-defined]
    if library == "transformers" and (path / "config.json").is_file():
        import transformers

        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            config = cls.config_class.from_pretrained(path)  # type: ignore[attr-defined]
            with torch.device("meta"):
                return cls(config)
    return None


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return nn.Module.to(model.eval(), device="meta", dtype=dtype)
