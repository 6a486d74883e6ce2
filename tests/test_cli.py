"""The command line: doctor, help, versions, and how errors end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from test_packaging import ROOT, tomllib
from typer.testing import CliRunner

import accelrt
from accelrt.cli import app, errors, scenarios
from accelrt.reporting.environment import (
    OPTIONAL,
    REQUIRED,
    Package,
    code_for,
    conclude,
    inspect_environment,
    inspect_packages,
    satisfies,
)

BUILD = {
    "loaded": True, "error": None, "cuda_kernels": "nvcc", "cuda_compiler": "13.0.88",
    "cuda_architectures": "80,90a,120", "best_isa": "avx512", "active_isa": "avx512",
}  # fmt: skip
RUNTIME = {**BUILD, "cuda_kernels": "runtime", "cuda_architectures": None}
NO_GPU = {"torch": {"cuda": None, "devices": []}, "nvidia": {"devices": []}, "cupy": None}
FOUND = Package("torch", "tensors", True, "2.13.0", ">=2.11", "")


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_debug", False)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_version_and_help() -> None:
    assert run("--version").stdout == f"accelrt {accelrt.__version__}\n"
    text = run("--help").stdout
    for word in ("doctor", "demo", "Exit codes", "--debug"):
        assert word in text
    assert "Exit codes" in run("demo", "--help").stdout
    assert "Exit codes" in run("doctor", "-h").stdout


def test_python_m_accelrt() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "accelrt", "--version"],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"accelrt {accelrt.__version__}\n"


def test_doctor() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "accelrt is usable here." in result.stdout
    assert torch.__version__ in result.stdout


def test_doctor_json() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["usable"] is True
    assert found["build"]["active_isa"] in found["build"]["cpu_isas"]
    assert found["machine"]["torch"]["version"] == torch.__version__
    assert found["build"]["cuda_kernels"] in ("nvcc", "runtime", "none")
    assert "cupy" in found["machine"]
    assert any(line.startswith("CUDA kernels: ") for line in found["statements"])
    assert {p["name"] for p in found["packages"]} >= {"torch", "diffusers", "nvidia-ml-py"}
    assert found["statements"][-1] == "accelrt is usable here."


def test_doctor_runs_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelrt._C", None)
    result = run("doctor")
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert "The extension does not load" in text
    assert "`pip install .`" in text
    assert "accelrt is not usable here." in text
    assert json.loads(run("doctor", "--json").stdout)["build"]["loaded"] is False


def test_doctor_with_a_wrong_isa() -> None:
    code = "from accelrt.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor"],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
        env={"PATH": "", "ACCELRT_CPU_ISA": "mmx", "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "ACCELRT_CPU_ISA is 'mmx'" in done.stdout


def device(code: str | None, cupy: str | None = None, cuda: str | None = "13.0") -> dict[str, Any]:
    gpu = {"name": "H200", "capability": "9.0", "code": code}
    devices = [] if cuda is None else [gpu]
    return {
        "torch": {"cuda": cuda, "devices": devices},
        "nvidia": {"devices": [gpu]},
        "cupy": cupy,
    }


@pytest.mark.parametrize(
    ("build", "machine", "statement"),
    [
        (BUILD, NO_GPU, "CUDA kernels: compiled by nvcc 13.0.88 for sm 80,90a,120."),
        (BUILD, NO_GPU, "torch is CPU only: the CPU kernels run."),
        (RUNTIME, NO_GPU, "CUDA kernels: none: this build compiles them at first use"),
        (RUNTIME, device(None), "`pip install 'accelrt[cuda]'`"),
        (RUNTIME, device(None, cuda="12.8"), "`pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12`"),
        (
            RUNTIME,
            device(None, cupy="14.2.0"),
            "CUDA kernels: compiled at first use by NVRTC through CuPy 14.2.0.",
        ),
        (BUILD, {**NO_GPU, "torch": {"cuda": "13.0", "devices": []}}, "it finds no GPU"),
        (BUILD, device("binary"), "this build has code for it"),
        (BUILD, device("ptx"), "runs from PTX"),
        (BUILD, device(None), "rebuild with ACCELRT_CUDA_ARCHS=90"),
        (
            {**BUILD, "cuda_kernels": "none"},
            device(None),
            "There is a GPU, but this build has no CUDA",
        ),
        ({**BUILD, "cuda_kernels": "none"}, NO_GPU, "CUDA kernels: none: built with"),
        ({**BUILD, "active_isa": "avx2"}, NO_GPU, "restricts the CPU kernels to avx2"),
        ({**BUILD, "active_isa": "amx_emulated"}, NO_GPU, "is for tests"),
        (
            {**BUILD, "active_isa": "amx", "best_isa": "amx"},
            NO_GPU,
            "never on such a processor",
        ),
    ],
)
def test_statements(build: dict[str, Any], machine: dict[str, Any], statement: str) -> None:
    found = conclude(build, machine, (FOUND,))
    assert found.usable
    assert any(statement in line for line in found.statements), found.statements


def test_missing_packages() -> None:
    optional = Package("jinja2", "the report", False, None, "", "pip install 'jinja2'")
    found = conclude(BUILD, NO_GPU, (FOUND, optional))
    assert found.usable
    assert "jinja2 is missing (the report): `pip install 'jinja2'`" in found.statements
    old = Package("torch", "tensors", True, "2.9", ">=2.11", "pip install 'torch>=2.11'")
    found = conclude(BUILD, NO_GPU, (old,))
    assert not found.usable
    assert "torch 2.9 does not fit" in found.statements[0]


def test_packages_are_held_against_our_metadata() -> None:
    packages = {package.name: package for package in inspect_packages()}
    assert packages["torch"].requirement == ">=2.11"
    assert packages["torch"].version is not None
    assert packages["torch"].fix == ""
    assert inspect_environment().usable
    # Whatever a message sends the user to the doctor for is in the list.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {re.split(r"[<>=]", name)[0] for name in project["dependencies"]} == set(REQUIRED)
    extras = project["optional-dependencies"]
    assert {*extras["demo"], *extras["train"], "nvidia-ml-py"} == set(OPTIONAL)
    assert "nvidia-ml-py" in extras["cuda"]


@pytest.mark.parametrize(
    ("version", "requirement", "fits"),
    [
        ("2.13.0+cpu", ">=2.11", True), ("2.9.1", ">=2.11", False),
        ("0.42.1", ">=0.42,<0.43", True),
        ("0.43.0.dev0", "<0.43,>=0.42", False), ("1.0", "", True), ("2.11", "==2.11.0", True),
    ],
)  # fmt: skip
def test_satisfies(version: str, requirement: str, fits: bool) -> None:
    assert satisfies(version, requirement) is fits


@pytest.mark.parametrize(
    ("capability", "architectures", "code"),
    [
        ((8, 0), "80,86,90a", "binary"),
        ((8, 7), "80,86,90a", "binary"),  # code for 8.6 runs on 8.7
        ((9, 0), "80,86,90a", "binary"),
        ((9, 2), "80,86,90a", None),  # 90a is for 9.0 only, and so is its PTX
        ((7, 5), "80,86,90a", None),
        ((12, 1), "100,120", "binary"),
        ((13, 0), "100,120", "ptx"),
        ((8, 0), "", None),
        ((11, 0), "80,90a,100,120", "ptx"),  # what 120 runs was made from the PTX of 100
        ((10, 0), "80,90a,120", None),
        ((9, 0), "80,86", "ptx"),
    ],
)
def test_code_for(capability: tuple[int, int], architectures: str, code: str | None) -> None:
    assert code_for(capability, architectures) == code


def test_user_errors_end_with_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    config = tmp_path / "config.json"
    config.write_text('{"slice": 3}')
    cases = [
        (("--model", str(tmp_path / "nope")), "neither a folder nor a hub id"),
        (("--model", str(empty)), "no model_index.json"),
        (("--config", str(config)), "unknown setting slice"),
        (("--config", str(tmp_path / "gone.json")), "gone.json"),
        (("--prompt", "a seven"), "--prompt, --frames and --image go with --model"),
        (("--model", str(empty), "--steps", "0"), "steps"),
    ]
    if not torch.cuda.is_available():
        cases.append((("--device", "cuda"), "--device cuda is not available here"))
    for arguments, message in cases:
        result = run("demo", "--out", str(tmp_path / "out"), *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in " ".join(result.stderr.split()), result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    result = run("--debug", "demo", "--model", str(empty))
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "FileNotFoundError" in result.stderr


def test_unsupported_pipeline(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    result = run("demo", "--model", str(tmp_path / "ddpm"), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "supported models: AutoencoderKL" in " ".join(result.stderr.split())


def test_hub_id_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Cannot load model nobody/nothing: no connection\nand more")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", offline)
    result = run("demo", "--model", "nobody/nothing", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "nobody/nothing cannot be loaded: Cannot load model" in result.stderr


def test_reference_models_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accelrt, "__file__", str(tmp_path / "site" / "accelrt" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="animatediff, dit, pixart, svd") as caught:
        scenarios.reference_folder()
    assert scenarios.TRAIN_COMMAND in str(caught.value)
    for name in scenarios.REFERENCE_NAMES:
        folder = tmp_path / scenarios.REFERENCE_FOLDER / name
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
    assert scenarios.reference_folder() == tmp_path / scenarios.REFERENCE_FOLDER


def test_generic_calls(tmp_path: Path) -> None:
    class Text:
        def __call__(self, prompt: Any = None, num_frames: int = 16, num_inference_steps: int = 9):
            raise AssertionError

    class Picture:
        def __call__(self, image: Any, num_inference_steps: int = 9):
            raise AssertionError

    assert scenarios.generic_call(Text(), 4, "a two", 3) == {
        "prompt": "a two", "num_frames": 3, "num_inference_steps": 4,
    }  # fmt: skip
    assert set(scenarios.generic_call(Text(), 4)) == {"prompt", "num_inference_steps"}
    dit = zoo.dit_pipeline()
    assert scenarios.generic_call(dit, 4) == {
        "class_labels": [0, 1, 2, 3], "num_inference_steps": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match="DiTPipeline takes no prompt"):
        scenarios.generic_call(dit, 4, "a two")
    with pytest.raises(ValueError, match="takes no num_frames"):
        scenarios.generic_call(dit, 4, None, 3)
    with pytest.raises(ValueError, match="Picture starts from a picture; give one with --image"):
        scenarios.generic_call(Picture(), 4)
    with pytest.raises(ValueError, match="Text takes no image"):
        scenarios.generic_call(Text(), 4, image=tmp_path / "first.png")
    Image.new("L", (5, 3), 7).save(tmp_path / "first.png")
    call = scenarios.generic_call(Picture(), 4, image=tmp_path / "first.png")
    assert call["image"].mode == "RGB"
    assert call["image"].size == (5, 3)
    (tmp_path / "broken.png").write_text("no picture")
    for name in ("broken.png", "missing.png"):
        with pytest.raises(FileNotFoundError, match=name):
            scenarios.generic_call(Picture(), 4, image=tmp_path / name)

    class Needy:
        def __call__(self, depth: Any, num_inference_steps: int = 9):
            raise AssertionError

    with pytest.raises(ValueError, match="Needy needs depth"):
        scenarios.generic_call(Needy(), 4)
