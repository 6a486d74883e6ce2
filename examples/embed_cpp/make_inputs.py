"""Writes the weights, inputs and outputs of a DiT's transformer blocks for main.cpp.

    python examples/embed_cpp/make_inputs.py --out dit.safetensors

Expected is the float64 output of the blocks, with weights and inputs rounded to ``--dtype``;
``stock_error`` in the metadata is how far diffusers is from it in that dtype.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

MODEL = Path(__file__).resolve().parent.parent / "reference_models" / "dit" / "transformer"
DTYPES = ("float32", "bfloat16", "float16")


class Given(nn.Module):
    """Stands for a block's embedding of timestep and class, and returns one made before.

    Args:
        conditioning: ``[B, D]``.
    """

    def __init__(self, conditioning: Tensor) -> None:
        super().__init__()
        self.register_buffer("conditioning", conditioning)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """The conditioning, ``[B, D]``."""
        return self.conditioning


def through(blocks: nn.ModuleList, x: Tensor, conditioning: list[Tensor]) -> Tensor:
    """``x`` ``[B, S, D]`` through copies of the blocks in its dtype."""
    for block, given in zip(blocks, conditioning, strict=True):
        own = copy.deepcopy(block).to(x.dtype)
        own.norm1.emb = Given(given.to(x.dtype))
        x = own(x)
    return x


def load(folder: Path, dtype: torch.dtype) -> DiTTransformer2DModel:
    """The transformer of a folder; ``dtype`` is that of the run in C++."""
    return DiTTransformer2DModel.from_pretrained(folder, torch_dtype=dtype).eval()


@torch.no_grad()
def inputs(model: DiTTransformer2DModel, samples: int) -> dict[str, Any]:
    """Tensors by name, and the metadata, as :func:`save_file` takes them.

    Args:
        model: its blocks have biases everywhere and a tanh GELU, as published DiTs do.
        samples: in the batch, of random latents, timesteps and classes.

    Raises:
        ValueError: the blocks are of another kind.
    """
    config, dtype = model.config, model.dtype
    if config.activation_fn != "gelu-approximate" or config.norm_elementwise_affine:
        raise ValueError(
            f"activation_fn is {config.activation_fn!r}, norm_elementwise_affine "
            f"{config.norm_elementwise_affine}; allowed: 'gelu-approximate', False"
        )
    generator = torch.Generator().manual_seed(0)
    blocks = model.transformer_blocks
    size = (samples, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(size, generator=generator, dtype=torch.float64)
    times = torch.randint(1000, (samples,), generator=generator)
    labels = torch.randint(config.num_embeds_ada_norm, (samples,), generator=generator)
    x = model.pos_embed(latents.to(dtype)).to(dtype).contiguous()
    conditioning = [block.norm1.emb(times, labels, hidden_dtype=dtype) for block in blocks]

    expected = through(blocks, x.double(), conditioning)
    stock = through(blocks, x, conditioning)
    error = (stock.double() - expected).norm() / expected.norm()
    tensors = {
        f"blocks.{name}": value.contiguous()
        for name, value in blocks.state_dict().items()
        if ".emb." not in name
    }
    tensors |= {f"conditioning.{i}": c.contiguous() for i, c in enumerate(conditioning)}
    tensors |= {"input": x, "expected": expected.float()}
    block: Any = blocks[0]
    metadata = {
        "layers": len(blocks),
        "heads": block.attn1.heads,
        "scale": block.attn1.scale,
        "norm1_eps": block.norm1.norm.eps,
        "norm2_eps": block.norm3.eps,
        "stock_error": error.item(),
    }
    return {"tensors": tensors, "metadata": {key: repr(value) for key, value in metadata.items()}}


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a DiT transformer")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("dit.safetensors"))
    options = parser.parse_args()
    made = inputs(load(options.model, getattr(torch, options.dtype)), options.samples)
    save_file(made["tensors"], options.out, metadata=made["metadata"])
    print(f"{options.out}: {len(made['tensors'])} tensors, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
