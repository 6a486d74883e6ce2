"""An installed accelrt, used once: run by ``.ci/package``, in a folder without its sources."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

import accelrt

PACKAGE = Path(accelrt.__file__).parent
assert PACKAGE.is_relative_to(sys.prefix), f"{PACKAGE} is not the installed one ({sys.prefix})"
assert metadata.version("accelrt") == accelrt.__version__
for name in ("py.typed", "_C.pyi", "profiling/templates/profile.html.j2"):
    assert (PACKAGE / name).is_file(), f"{name} is missing"
assert list(PACKAGE.glob("_C*.so")), "the extension is missing"


def answer(*words: str) -> Any:
    """What a command prints with ``--json``."""
    done = subprocess.run(["accelrt", *words, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, f"accelrt {' '.join(words)}: {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout)


found = answer("doctor")
assert found["usable"] is True, found["statements"]
assert answer("plan", "--model", "dit", "--budget", "min")["components"]
assert answer("bench", "--model", "dit", "--size", "tiny", "--repeats", "1", "--no-tuned-malloc",
              "--dtype", "fp32")["models"][0]["within"] is True  # fmt: skip

torch.manual_seed(0)
model = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8,
    num_embeds_ada_norm=10,
).eval()  # fmt: skip
call = {
    "hidden_states": torch.randn(2, 4, 8, 8),
    "timestep": torch.tensor([3, 9]),
    "class_labels": torch.tensor([1, 2]),
}
with torch.no_grad():
    stock = model(**call).sample
    accelrt.wrap(model, memory_budget="8MiB")
    ours = model(**call).sample
    accelrt.unwrap(model)
    assert torch.equal(model(**call).sample, stock)
torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
print(f"accelrt {accelrt.__version__} works as installed in {sys.prefix}")
