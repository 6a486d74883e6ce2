"""What is trained on: latents with classes, prompts or caption embeddings, from files or memory."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = ("metadata.jsonl", "captions.jsonl")
TEXTS = ("text", "caption", "prompt")
LABELS = ("label", "class")
#: Pictures and texts that are encoded together.
CHUNK = 16
_KEYS = "latents, and labels or encoder_hidden_states with encoder_attention_mask"

Captioned = tuple[Callable[[], Any], "int | str"]


@dataclass(frozen=True)
class LatentData:
    """Samples with their conditions, of which there is one kind.

    Args:
        latents: scaled as the transformer has them, ``[N, C, H, W]``.
        labels: classes, ``[N]``.
        prompts: texts, N of them.
        embeddings: ``states`` ``[N, L, D]`` and ``mask`` ``[N, L]`` of the captions; and of the
            empty caption ``empty_states`` ``[1, L, D]`` and ``empty_mask`` ``[1, L]``, which
            the pipeline encodes if they are not given.

    Raises:
        ValueError: nothing is given, several kinds of conditions, or not one for each sample.
    """

    latents: Tensor
    labels: Tensor | None = None
    prompts: Sequence[str] | None = None
    embeddings: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.latents.dim() != 4 or not len(self.latents):
            raise ValueError(
                f"latents are {list(self.latents.shape)}; allowed: [N, C, H, W], N > 0"
            )
        given: dict[str, Any] = {
            "labels": self.labels, "prompts": self.prompts,
            "embeddings": self.embeddings and self.embeddings["states"],
        }  # fmt: skip
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ValueError(
                f"conditions are given as {', '.join(named) or 'nothing'}; allowed: one of "
                f"{', '.join(given)}"
            )
        count = len(given[named[0]])
        if count != len(self.latents):
            raise ValueError(f"{count} {named[0]} for {len(self.latents)} latents")

    def fingerprint(self) -> str:
        """16 hexadecimal digits of what the samples are."""
        digest = hashlib.sha256(self.latents.detach().cpu().float().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.cpu().long().numpy().tobytes())
        if self.prompts is not None:
            digest.update(json.dumps(list(self.prompts)).encode())
        if self.embeddings is not None:
            digest.update(self.embeddings["states"].detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]


class PromptCoder:
    """The text encoder of a PixArt pipeline.

    Captions are not cleaned: they are encoded as they are written.

    Args:
        pipe: the pipeline.
        max_sequence_length: ``None`` for the pipeline's default.
        device: where it runs; it goes back to the CPU, since a T5 is larger than what is trained.

    Raises:
        ValueError: the pipeline has no text encoder.
    """

    def __init__(self, pipe: Any, max_sequence_length: int | None, device: torch.device) -> None:
        if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "tokenizer", None) is None:
            raise ValueError(
                f"the {type(pipe).__name__} has no text encoder; give data with caption embeddings "
                f"(empty_hidden_states among them)"
            )
        self.pipe, self.device = pipe, device
        self.options = {"clean_caption": False, "device": device}
        if max_sequence_length is not None:
            self.options["max_sequence_length"] = max_sequence_length

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States ``[N, L, D]`` and mask ``[N, L]`` of texts, on the CPU."""
        encoder = self.pipe.text_encoder
        before = next(encoder.parameters()).device
        encoder.to(self.device)
        found = []
        for i in range(0, len(texts), CHUNK):
            part = list(texts[i : i + CHUNK])
            encoded = self.pipe.encode_prompt(
                part, do_classifier_free_guidance=False, **self.options
            )
            found.append((encoded[0].cpu(), encoded[1].cpu()))
        encoder.to(before)
        return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])


def load_data(source: str | Path, pipe: Any) -> LatentData:
    """Read a data set from disk; pictures are encoded by the pipeline's VAE.

    Args:
        source: a folder of images (class folders, or ``metadata.jsonl`` or ``captions.jsonl``
            with ``file_name`` and ``text`` or ``label``), a folder that the ``datasets`` package
            saved, a ``.safetensors`` file of latents, or a folder of those.
        pipe: the pipeline.

    Raises:
        FileNotFoundError: there is nothing there.
        ImportError: for a ``datasets`` folder without that package; with the command.
        ValueError: what is there cannot be used, saying why.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        return _latent_files([path])
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a folder nor a .safetensors file")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return encode_images(_saved_dataset(path, pipe), pipe)
    files = sorted(path.glob("*.safetensors"))
    if files:
        return _latent_files(files)
    return encode_images(_image_folder(path, pipe), pipe)


def _latent_files(files: Sequence[Path]) -> LatentData:
    from safetensors.torch import load_file

    parts = [load_file(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        captions = "encoder_hidden_states" in part and "encoder_attention_mask" in part
        if "latents" not in part or ("labels" in part) == captions:
            raise ValueError(
                f"{file} holds {', '.join(sorted(part)) or 'nothing'}; needed: {_KEYS}"
            )

    def joined(key: str) -> Tensor:
        return torch.cat([part[key] for part in parts])

    latents = joined("latents").float()
    if all("labels" in part for part in parts):
        return LatentData(latents, labels=joined("labels").long())
    if any("labels" in part for part in parts):
        raise ValueError(f"{files[0].parent}: some files have labels, others captions")
    held = {"states": joined("encoder_hidden_states"), "mask": joined("encoder_attention_mask")}
    if "empty_hidden_states" in parts[0]:
        held["empty_states"] = parts[0]["empty_hidden_states"]
        held["empty_mask"] = parts[0]["empty_attention_mask"]
    return LatentData(latents, embeddings=held)


def _image_folder(path: Path, pipe: Any) -> list[Captioned]:
    """Pictures with a class or a text, as functions that open them."""
    from PIL import Image

    items: list[Captioned] = []
    tables = [path / name for name in METADATA if (path / name).is_file()]
    if tables:
        for number, line in enumerate(tables[0].read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{tables[0]}, line {number}"
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not valid JSON: {error}") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{where} is {entry!r}; needed: a mapping")
            key = next((key for key in (*TEXTS, *LABELS) if key in entry), None)
            if key is None or "file_name" not in entry:
                raise ValueError(
                    f"{where} has {', '.join(entry)}; needed: file_name, and one of "
                    f"{', '.join((*TEXTS, *LABELS))}"
                )
            name = entry["file_name"]
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{where}: file_name is {name!r}; allowed: a file in the folder")
            file = path / name
            if not file.is_file():
                raise FileNotFoundError(f"{where}: there is no {file}")
            value = entry[key] if key in TEXTS else class_of(entry[key], pipe)
            items.append((partial(Image.open, file), value))
        return items
    for folder in sorted(each for each in path.iterdir() if each.is_dir()):
        files = sorted(each for each in folder.iterdir() if each.suffix.lower() in IMAGES)
        items += [(partial(Image.open, file), class_of(folder.name, pipe)) for file in files]
    if not items:
        raise ValueError(
            f"{path} has no images in class folders and no {' or '.join(METADATA)}; needed: one of "
            f"them, a datasets folder or .safetensors files"
        )
    return items


def class_of(name: Any, pipe: Any) -> int:
    """The id of a class that is given as its number or its name.

    Raises:
        ValueError: there is no such class.
    """
    text = str(name)
    if text.isdigit():
        return int(text)
    names: dict[str, int] = getattr(pipe, "labels", None) or {}
    if text in names:
        return int(names[text])
    some = ", ".join([*names][:5])
    raise ValueError(f"class {text!r} is unknown; allowed: numbers{', or ' if some else ''}{some}")


def _saved_dataset(path: Path, pipe: Any) -> list[Captioned]:
    """Rows of a folder that ``Dataset.save_to_disk`` wrote."""
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(f"{path} was saved by datasets, which is missing: pip install datasets")
    import datasets

    loaded: Any = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) > 1:
            raise ValueError(f"{path} has the splits {', '.join(loaded)}; needed: train, or one")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    columns = loaded.column_names
    key = next((key for key in (*TEXTS, *LABELS) if key in columns), None)
    if "image" not in columns or key is None:
        raise ValueError(
            f"{path} has the columns {', '.join(columns)}; needed: image, and one of "
            f"{', '.join((*TEXTS, *LABELS))}"
        )
    values = [value if key in TEXTS else class_of(value, pipe) for value in loaded[key]]

    def opened(row: int) -> Any:
        return loaded[row]["image"]

    return [(partial(opened, i), value) for i, value in enumerate(values)]


def encode_images(items: Sequence[Captioned], pipe: Any) -> LatentData:
    """Encode pictures by the mean of the VAE's posterior, scaled.

    Args:
        items: pictures, as functions that open them, each with its class or its text.
        pipe: the pipeline; pictures are scaled and cut to its default size.

    Raises:
        ValueError: there is no picture, or one cannot be read.
    """
    if not items:
        raise ValueError("the data set has no pictures")
    vae = pipe.vae
    size = int(pipe.transformer.config.sample_size) * 2 ** (len(vae.config.block_out_channels) - 1)
    latents: list[Tensor] = []
    conditions: list[int | str] = []
    waiting: list[Tensor] = []

    def flush() -> None:
        pixels = torch.stack(waiting).to(vae.device, vae.dtype)
        with torch.no_grad():
            mean = vae.encode(pixels).latent_dist.mean.float()
        shift = getattr(vae.config, "shift_factor", None) or 0
        latents.append(((mean - shift) * vae.config.scaling_factor).cpu())
        waiting.clear()

    for picture, condition in items:
        waiting.append(_pixels(picture, size))
        conditions.append(condition)
        if len(waiting) == CHUNK:
            flush()
    if waiting:
        flush()
    encoded = torch.cat(latents)
    if all(isinstance(each, str) for each in conditions):
        return LatentData(encoded, prompts=[str(each) for each in conditions])
    return LatentData(encoded, labels=torch.tensor([int(each) for each in conditions]))


def _pixels(picture: Callable[[], Any], size: int) -> Tensor:
    """The middle square, ``[3, size, size]`` from -1 to 1."""
    from PIL import Image

    try:
        image = picture().convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"a picture cannot be read: {error}") from error
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
