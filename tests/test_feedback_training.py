"""Training of feedback modules: what is trained, resuming, the files, several processes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_pixart
from accelerate.state import AcceleratorState
from diffusers import DiTPipeline
from model_zoo import one_thread  # noqa: F401
from safetensors.torch import load_file, save_file
from training_common import REFERENCE, latents, settings, training_of
from typer.testing import CliRunner

import accelrt
from accelrt.cli import app, errors
from accelrt.feedback import FeedbackModule
from accelrt.feedback.training import DistillConfig, api, distill, tree
from accelrt.feedback.training.state import Checkpoints
from accelrt.feedback.training.validation import Validator

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Two passes each step, a round's end and an epoch's end on the way, data and a random scale.
LONG: dict[str, Any] = {
    "steps": 10, "accumulate": 2, "pool": 6, "epochs": 2, "checkpoint_every": 3,
    "diffusion_weight": 0.1, "guidance_scale": [1.5, 3.0], "classes": None, "save_dtype": "fp32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps the precision of the first training in a process."""
    monkeypatch.setattr(errors, "_debug", False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(out: Path, config: DistillConfig | None = None, data: Any = None, **more: Any) -> Any:
    pipe = more.pop("pipe", None) or zoo.dit_pipeline()
    return distill(pipe, config or settings(), out, data, cpu=True, progress=False, **more)


def last_state(out: Path) -> dict[str, Any]:
    state = Checkpoints(out / "checkpoints").load()
    assert state is not None
    return state


@pytest.mark.parametrize("objective", ["landing", "ahead"])
def test_only_the_feedback_module_is_trained(objective: str, tmp_path: Path) -> None:
    pipe = zoo.dit_pipeline()
    model = pipe.transformer.train()
    model.pos_embed.proj.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    config = settings(objective=objective, classes=None, save_dtype="fp32")
    result = train(tmp_path, config, latents(), pipe=pipe)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        assert parameter.requires_grad == needed[name], name
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    _, fresh = training_of(config, data=latents())
    trained = dict(result.module.named_parameters())
    assert set(trained) == {name for name, _ in fresh.named_parameters()}
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(parameter, trained[name]), name


def test_frozen_scales_are_no_parameters(tmp_path: Path) -> None:
    result = train(tmp_path, settings(learned_scale=False))
    assert "scales" not in dict(result.module.named_parameters())
    assert result.module.scales.eq(1).all()


@pytest.mark.parametrize(
    "module",
    [
        {"conditioning": "ahead", "enters": "first", "scale_shape": "block", "passes": 2},
        {"copy_block": 1, "scale_shape": "scalar", "start": 0, "length": 2},
    ],
)
def test_pixart_is_trained_whole(module: dict[str, Any], tmp_path: Path) -> None:
    """Every parameter: several processes wait for all gradients."""
    held = {
        "states": zoo.normal(7, 7, 20), "mask": zoo_pixart.caption_mask(7),
        "empty_states": zoo.normal(1, 7, 20, seed=2), "empty_mask": zoo_pixart.caption_mask(1),
    }  # fmt: skip
    config = settings(classes=None, diffusion_weight=0.1, save_dtype="fp32", **module)
    data = latents(7, embeddings=held)
    pipe = zoo_pixart.sigma_pipeline()
    result = train(tmp_path, config, data, pipe=pipe)
    fresh = api._new_module(pipe.transformer, config, pipe.scheduler, (2.0, 2.0))
    trained = dict(result.module.named_parameters())
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(parameter, trained[name]), name
    assert result.validation["feedback"] != result.validation["without"]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import model_zoo as zoo
from training_common import latents, settings
from accelrt.feedback.training import distill
import json

def on_step(step):
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

config = settings(**json.loads(sys.argv[3]))
distill(zoo.dit_pipeline(), config, sys.argv[2], latents(), cpu=True, progress=False,
        on_step=on_step)
"""


def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", settings(**LONG), latents())
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "cut"),
         json.dumps(LONG)],
        capture_output=True, text=True, cwd=Path(accelrt.__file__).parent.parent,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "cut" / WEIGHTS).exists()
    assert last_state(tmp_path / "cut")["step"] == 6
    resumed = train(tmp_path / "cut", settings(**LONG), latents())
    assert resumed.resumed_at == 6
    assert whole.resumed_at == 0
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("cut", "whole"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.losses == whole.losses
    ours, theirs = (last_state(tmp_path / name) for name in ("cut", "whole"))
    for name in ("module", "average", "optimizer"):
        assert _equal(ours[name], theirs[name]), name
    assert {k: v.to_dict() for k, v in resumed.validation.items()} == {
        k: v.to_dict() for k, v in whole.validation.items()
    }


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_resuming_in_another_rhythm(tmp_path: Path) -> None:
    """A step that was not logged yet is in the checkpoint; other settings are refused."""

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    rhythm = {"steps": 6, "checkpoint_every": 3, "log_every": 2}
    whole = train(tmp_path / "whole", settings(**rhythm))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", settings(**rhythm), on_step=stop)
    with pytest.raises(ValueError, match=r"other settings: lr 0.002, now 0.01"):
        train(tmp_path / "cut", settings(**rhythm, lr=0.01))
    with pytest.raises(ValueError, match="data None, now '"):
        train(tmp_path / "cut", settings(**rhythm), latents(labels=torch.ones(7)))
    other = zoo.dit_pipeline()
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter.mul_(2)
    with pytest.raises(ValueError, match="backbone"):
        train(tmp_path / "cut", settings(**rhythm), pipe=other)
    resumed = train(tmp_path / "cut", settings(**rhythm, validate_every=2))
    assert resumed.losses == whole.losses
    again = train(tmp_path / "cut", settings(**rhythm))
    assert again.resumed_at == 6
    assert again.validation == resumed.validation


def test_states_go_round(tmp_path: Path) -> None:
    """Trees as optimizers have them, as data only."""
    shared = torch.arange(4.0)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "average": shared}, 1: {"average": shared}},
        "param_groups": [{"betas": (0.9, 0.999), "params": [0, 1], "foreach": None}],
        "losses": [{"loss": 0.1}, {"loss": float("inf")}],
        "bfloat16": torch.ones(2, 3, dtype=torch.bfloat16).t(),
    }
    tree.save(tmp_path / "state", state)
    found = tree.load(tmp_path / "state")
    assert found["param_groups"] == state["param_groups"]
    assert found["losses"] == state["losses"]
    assert found["state"][0]["step"].shape == ()
    assert torch.equal(found["state"][1]["average"], shared)
    assert torch.equal(found["bfloat16"], state["bfloat16"])
    assert found["bfloat16"].dtype == torch.bfloat16
    for value in ({"a": object()}, {"a": {(1, 2): 3}}):
        with pytest.raises(TypeError):
            tree.save(tmp_path / "other", value)
    save_file({"a": shared}, tmp_path / "weights")
    (tmp_path / "pickle").write_bytes(pickle.dumps(state))
    for name in ("weights", "pickle"):
        with pytest.raises(ValueError, match="no state of a training"):
            tree.load(tmp_path / name)


def test_checkpoints_are_two_and_whole(tmp_path: Path) -> None:
    train(tmp_path, settings(steps=5, checkpoint_every=1))
    files = sorted(each.name for each in (tmp_path / "checkpoints").iterdir())
    assert files == [f"checkpoint-0000000{step}.safetensors" for step in (4, 5)]
    (tmp_path / "checkpoints" / files[-1]).write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint-00000005.safetensors is no checkpoint"):
        train(tmp_path, settings(steps=5, checkpoint_every=1))


def test_what_is_written(tmp_path: Path) -> None:
    config = settings(
        steps=4, validate_every=2, timesteps=[900, 500, 60], feedback=[True, False, True],
        ahead=0.25, guidance_scale=[1.5, 3.0], start=1, length=2,
    )  # fmt: skip
    result = train(tmp_path, config)
    assert {each.dtype for each in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}
    loaded = FeedbackModule.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(
        loaded.named_parameters(), result.module.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    schedule = loaded.schedules[6]
    assert schedule.timesteps == (900, 500, 60)
    assert schedule.feedback == (True, False, True)
    assert schedule.ahead == 0.25
    assert list(loaded.config.guidance_scale) == [1.5, 3.0]
    assert loaded.config.scheduler_class == "DPMSolverMultistepScheduler"
    assert loaded.config.scheduler_config["beta_schedule"] == "linear"
    assert (loaded.config.start, loaded.config.length) == (1, 2)
    loaded.check(zoo.dit_pipeline().transformer)

    report = json.loads((tmp_path / "training.json").read_text())
    assert DistillConfig.from_dict(report["config"]) == config
    assert report["validation"]["feedback"] == result.validation["feedback"].to_dict()
    assert report["versions"]["torch"] == torch.__version__
    curve = json.loads((tmp_path / "losses.json").read_text())
    assert [point["step"] for point in curve["losses"]] == [1, 2, 3, 4]
    assert curve["losses"] == result.losses
    assert [each["step"] for each in curve["validation"]] == [2]


def test_tensorboard_reads_the_log(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(tmp_path, settings(tensorboard=True))
    events = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    found = [(each.step, each.value) for each in events.Scalars("loss")]
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert [value for _, value in found] == pytest.approx([p["loss"] for p in result.losses])
    (last,) = events.Scalars("validation/feedback/relative_l2")
    assert last.value == pytest.approx(result.validation["feedback"].relative_l2)


@pytest.mark.parametrize("package", ["accelerate", "tensorboard"])
def test_missing_packages(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        api.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(ImportError, match=f"pip install {package}"):
        train(tmp_path, settings(tensorboard=True))
    assert not list(tmp_path.iterdir())


def test_mixed_precision_with_a_backbone_in_bf16(tmp_path: Path) -> None:
    pipe = zoo.dit_pipeline(torch.bfloat16)
    with pytest.raises(ValueError, match="mixed_precision is 'no'"):
        train(tmp_path, settings(), pipe=pipe)
    config = settings(mixed_precision="bf16", diffusion_weight=0.1, classes=None)
    result = train(tmp_path, config, latents(), pipe=pipe)
    assert {value.dtype for value in last_state(tmp_path)["module"].values()} == {torch.float32}
    assert result.module.dtype == torch.bfloat16
    assert all(math.isfinite(point["loss"]) for point in result.losses)
    assert math.isfinite(result.validation["feedback"].relative_l2)


def test_a_loss_that_is_not_finite_stops_it(tmp_path: Path) -> None:
    config = settings(diffusion_weight=1.0, classes=None)
    data = latents()
    data.latents[:] = math.nan
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        train(tmp_path, config, data)


def test_losses_fall_on_the_reference_dit(tmp_path: Path) -> None:
    pipe = DiTPipeline.from_pretrained(REFERENCE / "dit", dtype=torch.float32)
    config = DistillConfig(
        outer=3, stands_for=6, substeps=3, pool=16, epochs=100, batch=16, steps=30, lr=3e-3,
        warmup=3, ema_decay=0.8, validation_samples=8, log_every=10, tensorboard=False,
        guidance_scale=4.0,
    )  # fmt: skip
    result = train(tmp_path, config, pipe=pipe)
    first, *_, last = (point["loss"] for point in result.losses)
    assert last < 0.8 * first
    assert result.improved
    rows = result.validation
    assert rows["feedback"].psnr_db > rows["without"].psnr_db
    # Finer plain steps come nearer to the teacher's: the truth is what it should be.
    assert rows["stands_for"].relative_l2 < rows["equal_blocks"].relative_l2
    assert rows["equal_blocks"].relative_l2 < rows["without"].relative_l2


def test_validation_without_training_is_that_without_feedback() -> None:
    training, module = training_of(settings(guidance_scale=[1.0, 3.0]))
    rows = Validator(training, module).run()
    assert rows["feedback"].relative_l2 == rows["without"].relative_l2 > 0
    assert rows["feedback"].psnr_db == rows["without"].psnr_db
    assert rows["without"].blocks == 3 * 3
    # Three blocks of the model, one loop block again, the feedback block.
    assert rows["feedback"].blocks == 3 * (3 + 1 + 1)
    assert rows["equal_blocks"].steps == 5
    with torch.no_grad():
        module.scales.fill_(0.5)
    changed = Validator(training, module).run()
    assert changed["feedback"].relative_l2 != rows["feedback"].relative_l2
    assert changed["without"] == rows["without"]


def test_validation_samples_as_the_pipeline_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers.pipelines.dit.pipeline_dit as module

    pipe = zoo.dit_pipeline()
    training, feedback = training_of(settings(), pipe)
    validator = Validator(training, feedback)
    ours = validator._sampled(training.outer.started, fed=False)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: validator.noise.clone())
    kept: list[torch.Tensor] = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z: kept.append(z) or decode(z))
    pipe.scheduler = training.outer.scheduler
    labels = training.denoiser.table["class_labels"][validator.index].tolist()
    images = pipe(labels, guidance_scale=2.0, num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(ours, kept[0] * pipe.vae.config.scaling_factor)
    torch.testing.assert_close(training.denoiser.pictures(ours), images)


def test_what_cannot_be_trained_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="AnimateDiffPipeline cannot be trained for"):
        train(tmp_path, pipe=zoo.animatediff_pipeline())
    wrapped = accelrt.wrap(zoo.dit_pipeline())
    with pytest.raises(ValueError, match=r"accelrt.unwrap"):
        train(tmp_path, pipe=wrapped)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a file; allowed: a folder"):
        train(tmp_path / "file")
    with pytest.raises(ValueError, match="classes go from 1 to 1000; allowed: 0 to 999"):
        train(tmp_path, settings(classes=[1, 1000]))
    with pytest.raises(ValueError, match="takes classes, no prompts"):
        train(tmp_path, settings(prompts=["a seven"]))
    with pytest.raises(ValueError, match="takes prompts, no classes"):
        train(tmp_path, pipe=zoo_pixart.sigma_pipeline())
    with pytest.raises(ValueError, match="give data or prompts"):
        train(tmp_path, settings(classes=None), pipe=zoo_pixart.sigma_pipeline())
    with pytest.raises(ValueError, match="has no text encoder"):
        train(tmp_path, settings(classes=None, prompts=["a"]), pipe=zoo_pixart.sigma_pipeline())
    with pytest.raises(ValueError, match="objective ahead needs data"):
        train(tmp_path, settings(objective="ahead"))
    with pytest.raises(ValueError, match=r"diffusion_weight is 0\.5, but there is no data"):
        train(tmp_path, settings(diffusion_weight=0.5))
    with pytest.raises(ValueError, match="do not fit in 3 blocks"):
        train(tmp_path, settings(start=2, length=2))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file"]


TWO = """
import os
import pickle
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import model_zoo as zoo
from training_common import latents, settings
from accelrt.feedback.training import distill

config = settings(steps=3, accumulate=2, pool=8, diffusion_weight=0.1, classes=None)
result = distill(zoo.dit_pipeline(), config, sys.argv[2], latents(), cpu=True, progress=False)
total = sum(float(p.double().sum()) for p in result.module.parameters())
with open(sys.argv[3] + "/weights-" + os.environ["RANK"] + ".txt", "w") as file:
    print(total, result.losses, result.validation["feedback"], file=file)
"""


@pytest.mark.slow
def test_two_processes_train_one_module(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    root = Path(accelrt.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--local-addr", "127.0.0.1", "--nproc_per_node", "2",
         str(tmp_path / "two.py"), str(Path(__file__).parent), str(tmp_path / "out"),
         str(tmp_path)],
        capture_output=True, text=True, cwd=root, timeout=300,
        env={
            **os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"weights-{rank}.txt").read_text() for rank in (0, 1))
    assert first
    assert first == second
    assert json.loads((tmp_path / "out" / "training.json").read_text())["processes"] == 2


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["distill", *arguments])


def test_command(tmp_path: Path) -> None:
    settings_file = tmp_path / "settings.yaml"
    settings_file.write_text(
        "outer: 3\nstands_for: 6\nsubsteps: 2\npool: 8\nbatch: 8\nwarmup: 1\n"
        "validation_samples: 4\nlog_every: 1\ntensorboard: false\nema_decay: 0.5\n"
    )
    out = tmp_path / "out"
    common = [
        "--model", "dit", "--config", str(settings_file), "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    result = run(*common, "--steps", "6", "--lr", "0.003", "--json")
    assert result.exit_code in (0, 1), result.output
    found = json.loads(result.stdout)
    assert result.exit_code == (0 if found["improved"] else 1)
    assert set(found["validation"]) == {"feedback", "without", "equal_blocks", "stands_for"}
    report = json.loads((out / "training.json").read_text())
    assert (report["config"]["steps"], report["config"]["lr"]) == (6, 0.003)
    assert report["config"]["outer"] == 3
    again = run(*common, "--steps", "6", "--lr", "0.003")
    assert again.exit_code == result.exit_code
    assert "the same steps without" in again.output
    refused = run(*common, "--steps", "7", "--lr", "0.003")
    assert refused.exit_code == 2
    assert "steps 6, now 7" in refused.output

    # Nothing was learned: the finding is negative, and the module is there all the same.
    common[-1] = str(tmp_path / "nothing")
    idle = run(*common, "--steps", "1", "--lr", "1e-12")
    assert idle.exit_code == 1, idle.output
    assert "not below that of the same steps" in " ".join(idle.output.split())
    assert (tmp_path / "nothing" / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "dit", "--steps", "0"], "steps is 0; allowed: an integer >= 1"),
        (["--model", "dit", "--data", "nowhere"], "--data is nowhere; there is no such"),
        (["--model", "nowhere"], "neither a folder nor a hub id"),
        (["--model", "svd"], "StableVideoDiffusionPipeline cannot be trained for"),
        (["--model", "dit", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--model", "dit", "--config", "settings.toml"], "allowed: .yaml, .yml, .json"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*arguments, "--out", str(tmp_path / "out"), "--device", "cpu")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dit", "pixart"])
def test_modules_of_the_reference_models_by_one_command(model: str, tmp_path: Path) -> None:
    values = {"outer": 3, "stands_for": 6, "substeps": 2, "pool": 8, "batch": 8, "steps": 2}
    more = {"tensorboard": False, "validation_samples": 2, "max_sequence_length": 32}
    (tmp_path / "a.json").write_text(json.dumps({**values, **more}))
    root = Path(accelrt.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, str(REFERENCE / "train_feedback.py"), "--model", model, "--threads", "1",
         "--config", str(tmp_path / "a.json"), "--work", str(tmp_path / "work"),
         "--out", str(tmp_path / "out"), "--steps", "3"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = {each.name for each in (tmp_path / "out").iterdir()}
    assert written == {WEIGHTS, "config.json", "training.json", "losses.json"}
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["config"]["steps"] == 3
    loaded = FeedbackModule.from_pretrained(tmp_path / "out")
    assert loaded.schedules[6].outer == 3
    assert "equal_blocks   5 steps" in done.stdout
