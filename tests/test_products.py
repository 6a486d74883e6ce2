"""Linear layers and attention of the groups: which kernel runs, and that callers cannot tell."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from ops_common import assert_as_good_as
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from accelrt import _C
from accelrt.config import Config
from accelrt.groups import products
from accelrt.groups.feed_forward import FeedForwardRunner
from accelrt.groups.slicing import probing

USES_TILES = True
BF16 = torch.bfloat16


class Names(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def called(run) -> set[str]:
    with torch.no_grad(), Names() as names:
        run()
    return set(names.seen)


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(48, 40).to(BF16)


def test_who_computes_depends_on_the_processor_and_the_dtype(isa, layer):
    x = torch.randn(2, 20, 48).to(BF16)
    ours = _C.own_linear_is_faster("bfloat16", 48)
    tiles = isa in ("amx", "amx_emulated")
    # oneDNN uses tile registers where there are any: then the level below is behind. It has
    # nothing for bfloat16 where there is no AVX-512.
    assert ours == (tiles or isa == _C.best_isa() in ("avx2", "avx512bf16"))
    assert ("accelrt::linear" in called(lambda: products.project(layer, x))) == ours
    assert "accelrt::linear" not in called(lambda: products.project(layer, x, fuse=False))
    few = x.flatten(0, 1)[: products.FEWEST_ROWS - 1]
    assert "accelrt::linear" not in called(lambda: products.project(layer, few))
    q = torch.randn(1, 7, 2, 24).to(BF16)
    ours = _C.own_attention_is_faster("bfloat16", 24)
    names = called(lambda: products.attention(q, q, q, None, scale=None))
    assert ("accelrt::attention" in names) == ours
    with pytest.raises(RuntimeError, match=r"'float8'.*allowed"):
        _C.own_linear_is_faster("float8", 48)
    wide = torch.randn(64, 48, dtype=torch.float64)
    assert "accelrt::linear" not in called(lambda: products.project(layer.double(), wide))


def test_what_is_not_plain_is_called(layer):
    x = torch.randn(3, 48).to(BF16)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        assert torch.equal(products.project(layer, x), layer(x))
    assert len(seen) == 2


def test_rows_of_any_layout(layer):
    x = torch.randn(4, 60, 48).to(BF16)
    truth = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    views = {
        "contiguous": (x, truth),
        "some tokens of each": (x[:, 1:40], truth[:, 1:40]),
        "some tokens of one": (x[2:3, 1:40], truth[2:3, 1:40]),
        "swapped": (x.transpose(0, 1), truth.transpose(0, 1)),
        "every second channel": (
            torch.stack((x, x), -1).flatten(-2)[..., ::2],
            truth,
        ),
    }
    with torch.no_grad():
        for name, (view, expected) in views.items():
            y = products.project(layer, view)
            assert y.shape == expected.shape, name
            assert_as_good_as(y, layer(view), expected)
            weight = layer.weight.detach()
            assert torch.equal(products.linear(view, weight, layer.bias), y), name


def test_masks(layer):
    q, k = (torch.randn(2, n, 3, 16).to(BF16) for n in (9, 11))
    boolean = torch.rand(2, 1, 1, 11) > 0.3
    boolean[..., 0] = True
    added = torch.zeros(2, 1, 1, 11).masked_fill(~boolean, -torch.inf).to(BF16)
    heads = [t.double().transpose(1, 2) for t in (q, k, k)]
    truth = F.scaled_dot_product_attention(*heads, attn_mask=boolean).transpose(1, 2).flatten(2)
    stock = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, k)), attn_mask=boolean
    )
    for mask in (boolean, added):
        y = products.attention(q, k, k, mask, scale=None)
        assert_as_good_as(y, stock.transpose(1, 2).flatten(2), truth)
    kept = q.clone()
    y = products.attention(q, k, k, added, scale=None)
    assert torch.equal(q, kept)
    assert torch.equal(products.attention(kept, k, k, added, scale=None, overwrite=True), y)


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu-approximate"])
def test_feed_forward_of_slices(isa, activation):
    """With a gate, without, into a part of the residual stream, and handed to the caller."""
    module = FeedForward(24, activation_fn=activation).to(BF16).eval().requires_grad_(False)
    wide = FeedForward(24, activation_fn=activation).double().eval().requires_grad_(False)
    wide.load_state_dict(module.state_dict())
    run = FeedForwardRunner(module, Config(ff_rows=50))
    x, stream = (torch.randn(2, 70, 24).to(BF16) for _ in range(2))
    gate = torch.randn(2, 6, 24).to(BF16)[:, 3]
    for g in (None, gate):
        factor = 1.0 if g is None else g[:, None]
        truth = stream.double() + (1.0 if g is None else g[:, None].double()) * wide(x.double())
        out = stream.clone()
        run(x.clone(), out, g)
        assert_as_good_as(out, stream + factor * module(x), truth)
    truth = stream[1:].double() + wide(x[1:].double())
    padded = torch.zeros(1, 90, 24, dtype=BF16)
    padded[:, 4:74] = stream[1:]
    run(x[1:].clone(), padded[:, 4:74])
    assert_as_good_as(padded[:, 4:74], stream[1:] + module(x[1:]), truth)
    assert not padded[:, :4].any()
    assert not padded[:, 74:].any()
    handed = []
    run(x.clone(), stream.clone(), add=lambda y, residual, _: handed.append(residual + y))
    together = torch.cat([part.flatten(0, -2) for part in handed]).view_as(stream)
    assert_as_good_as(together, stream + module(x), stream.double() + wide(x.double()))


def test_a_dry_run_stands_for_its_device(layer):
    x = torch.empty(64, 48, dtype=BF16, device="meta")
    meta = layer.to("meta")
    ours = _C.own_linear_is_faster("bfloat16", 48)
    with probing("cpu"):
        assert products.is_ours(meta, x) == ours
    with probing("cuda"):
        assert not products.is_ours(meta, x)


def test_our_attention_on_a_gpu_is_a_choice():
    before = _C.cuda_products()
    try:
        for name, dim, ours in (("torch", 24, False), ("own", 24, True), ("own", 20, False)):
            _C.set_cuda_products(name)
            q = torch.empty(1, 7, 2, dim, dtype=BF16, device="meta")
            with probing("cuda"):
                names = called(lambda q=q: products.attention(q, q, q, None, scale=None))
            assert ("accelrt::attention" in names) == ours
    finally:
        _C.set_cuda_products(before)


CHOOSE = """
import importlib.util, os, sys
import torch
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
try:
    _C.cuda_products()
except RuntimeError as reason:
    print(reason)
os.environ["ACCELRT_CUDA_PRODUCTS"] = "own"
print(_C.cuda_products())
"""


def test_the_environment_says_who_makes_the_products_on_a_gpu():
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE, _C.__file__], capture_output=True, text=True, check=True,
        env={**os.environ, "ACCELRT_CUDA_PRODUCTS": "ours"},
    )  # fmt: skip
    refusal, answer = done.stdout.splitlines()
    assert refusal.startswith("ACCELRT_CUDA_PRODUCTS is 'ours'; allowed: torch, own")
    assert answer == "own"


def test_an_unknown_maker_of_products_is_refused():
    before = _C.cuda_products()
    with pytest.raises(RuntimeError, match=r"'cublas'; allowed: torch, own"):
        _C.set_cuda_products("cublas")
    assert _C.cuda_products() == before
