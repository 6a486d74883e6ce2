"""What feedback modules are trained on: settings, data sets, and the targets of the objectives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import model_zoo as zoo
import numpy as np
import pytest
import torch
import zoo_pixart
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PixArtSigmaPipeline,
)
from model_zoo import one_thread  # noqa: F401
from PIL import Image
from safetensors.torch import save_file
from training_common import REFERENCE, latents, settings, solver, training_of

from accelrt.feedback import FeedbackSchedule
from accelrt.feedback.training import DistillConfig, LatentData, data, load_data
from accelrt.feedback.training.denoiser import PixArtDenoiser
from accelrt.feedback.training.objectives import Ahead, Landing, Student, chunks
from accelrt.feedback.training.solver import (
    Outer,
    check_affine,
    final_state,
    landing_outputs,
    solver_of,
    states,
)

CPU = torch.device("cpu")


def outer_of(scheduler: Any, count: int = 5, times: Any = None) -> Outer:
    return Outer.of(scheduler, FeedbackSchedule(20, (True,) * count, times))


def test_settings_go_to_files_and_back(tmp_path: Path) -> None:
    config = DistillConfig(
        timesteps=(900, 500), outer=2, feedback=(True, False), guidance_scale=(1.0, 4.0),
        scheduler_options={"solver_order": 3}, prompts=("a", "b"),
    )  # fmt: skip
    assert DistillConfig.from_dict(config.to_dict()) == config
    assert DistillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (tmp_path / "a.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "a.yaml").write_text("outer: 4\nguidance_scale: [1, 2]\nfeedback: [1, 0, 0, 0]\n")
    assert DistillConfig.from_file(tmp_path / "a.json") == config
    with pytest.raises(ValueError, match=r"a\.yaml: feedback is .*; allowed: true or false"):
        DistillConfig.from_file(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("outer: 4\nguidance_scale: [1, 2]\n")
    assert DistillConfig.from_file(tmp_path / "a.yaml").guidance_scale == (1, 2)
    assert DistillConfig().override(steps=7).steps == 7
    with pytest.raises(ValueError, match="unknown setting stepps; known: objective, "):
        DistillConfig.from_dict({"stepps": 3})
    with pytest.raises(ValueError, match="a config is a mapping of settings; got list"):
        DistillConfig.from_dict([1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "x"}, "objective is 'x'; allowed: landing, ahead"),
        ({"steps": 0}, "steps is 0; allowed: an integer >= 1"),
        ({"batch": True}, "batch is True"),
        ({"length": 0}, "length is 0; allowed: an integer >= 1"),
        ({"lr": 0}, "lr is 0; allowed: a number above 0"),
        ({"lr": "1"}, "lr is '1'"),
        ({"clip": float("nan")}, "clip is nan"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; allowed: a number from 0, below 1"),
        ({"ahead": 1}, "ahead is 1; allowed: a number from 0, below 1"),
        ({"betas": [0.9]}, "betas are [0.9]; allowed: two numbers"),
        ({"betas": [0.9, 1.0]}, "betas is 1.0"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5; allowed: a number from 1"),
        ({"guidance_scale": [4, 2]}, "guidance_scale is [4, 2]; allowed: the least first"),
        ({"guidance_scale": [1, 2, 3]}, "guidance_scale is (1, 2, 3)"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'; allowed: no, bf16, fp16"),
        ({"tensorboard": "yes"}, "tensorboard is 'yes'; allowed: true, false"),
        ({"timesteps": [9, 5]}, "timesteps has 2 entries; allowed: 10"),
        ({"timesteps": [5, 9], "outer": 2}, "timesteps are [5, 9]; allowed: falling"),
        ({"timesteps": [9.5, 5], "outer": 2}, "timesteps are [9.5, 5]; allowed: integers"),
        ({"timesteps": 9}, "timesteps is 9; allowed: a list"),
        ({"feedback": [False] * 10}, "feedback is false at every step"),
        ({"objective": "ahead", "ahead": 0.0}, "ahead is 0; the objective ahead needs"),
        ({"pool": 2, "batch": 32}, "makes 20 rows; allowed: at least batch, 32"),
        ({"classes": []}, "classes are []; allowed: ids from 0"),
        ({"prompts": [3]}, "prompts are [3]; allowed: texts"),
        ({"scheduler_options": 3}, "scheduler_options are 3; allowed: a mapping"),
    ],
)
def test_settings_that_are_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        DistillConfig.from_dict(values)
    assert message in str(caught.value)


def test_which_scheduler_is_trained_for() -> None:
    own = DPMSolverMultistepScheduler(solver_order=3)
    assert solver_of(own, None, {}).config.solver_order == 3
    assert solver_of(own, None, {"solver_order": 2}).config.solver_order == 2
    ddim = DDIMScheduler(beta_schedule="scaled_linear", beta_end=0.013)
    made = solver_of(ddim, None, {})
    assert type(made) is DPMSolverMultistepScheduler
    assert (made.config.beta_schedule, made.config.beta_end) == ("scaled_linear", 0.013)
    with pytest.raises(ValueError, match="DDIMScheduler does not take timesteps"):
        solver_of(own, "DDIMScheduler", {})
    with pytest.raises(ValueError, match="scheduler is 'DPM'; allowed: a scheduler of diffusers"):
        solver_of(own, "DPM", {})
    with pytest.raises(ValueError, match="has no option 'order'"):
        solver_of(own, None, {"order": 2})


def checked(scheduler: Any) -> None:
    """What a training checks before any work."""
    outer = outer_of(scheduler)
    check_affine(outer, (4, 8, 8))
    outer.fine(2)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (solver(algorithm_type="sde-dpmsolver++"), "the steps of DPMSolver.* are random"),
        (
            DDPMScheduler(timestep_spacing="trailing"),
            "the steps of DDPMScheduler are random; set `scheduler: DPMSolver",
        ),
        (solver(thresholding=True, sample_max_value=1.0), "are not affine"),
        (EulerDiscreteScheduler(), "does not keep the variance"),
        (HeunDiscreteScheduler(), "evaluates the model more than once"),
        (solver(use_karras_sigmas=True), "use_karras_sigmas"),
    ],
)
def test_schedulers_that_are_refused(scheduler: Any, message: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        checked(scheduler)
    assert torch.equal(state, torch.get_rng_state())


def test_times_of_the_steps() -> None:
    outer = outer_of(solver(), 3, (900, 401, 7))
    assert outer.fine(4) == (900, 776, 651, 526, 401, 303, 204, 106, 7, 6, 4, 2)
    with pytest.raises(ValueError, match="substeps is 8; allowed: up to 7, the timesteps from 7"):
        outer.fine(8)
    assert outer.ahead() == (900, 401, 7)
    half = Outer.of(solver(), FeedbackSchedule(9, (True, False, True), (900, 401, 7), 0.5))
    assert half.ahead() == (650, 204, 4)
    assert half.fed == (0, 2)
    with pytest.raises(ValueError, match="timesteps begin at 1000; allowed: up to 999"):
        outer_of(solver(), 2, (1000, 5))
    with pytest.raises(
        ValueError, match=r"makes the timesteps \[.*, 0\]; allowed: falling, above 0"
    ):
        outer_of(DDPMScheduler(), 4)
    own = outer_of(solver(), 4)
    assert own.times == tuple(int(t) for t in own.started().timesteps)


@pytest.mark.parametrize(
    "changed",
    [
        {"solver_order": 1},
        {"solver_order": 2},
        {"solver_order": 2, "solver_type": "heun", "timestep_spacing": "trailing"},
        {"solver_order": 3, "lower_order_final": False},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"prediction_type": "v_prediction"},
    ],
)
@pytest.mark.parametrize("times", [None, (999, 700, 350, 90, 20)])
def test_the_scheduler_lands_on_the_teachers_states(changed: Any, times: Any) -> None:
    pipe = zoo.dit_pipeline()
    outer = outer_of(solver(**changed), 5, times)
    check_affine(outer, (4, 8, 8))
    fine = outer.started_at(outer.fine(3))

    def teacher(x: torch.Tensor, k: int) -> torch.Tensor:
        time = fine.timesteps[k].expand(len(x))
        return pipe.transformer(x, timestep=time, class_labels=torch.tensor([3, 9])).sample[:, :4]

    with torch.no_grad():
        everything = list(states(fine, zoo.normal(2, 4, 8, 8), teacher))
    wanted = everything[::3]
    outputs, gains = landing_outputs(outer, wanted)
    assert len(wanted) == 6
    assert len(gains) == 5
    again = list(states(outer.started(), wanted[0], lambda x, k: outputs[k]))
    for ours, theirs in zip(again, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    # They are no plain outputs of the teacher's: one of those does not land.
    plain = outer.started()
    with torch.no_grad():
        first = final_state(plain, wanted[0], lambda x, k: teacher(x, 3 * k))
    assert (first - wanted[-1]).norm() > 1e-3 * wanted[-1].norm()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, [1.5, 4.0]])
def test_landing_loss_is_zero_where_it_lands(guidance_scale: Any) -> None:
    """And else the squared error, weighted."""
    config = settings(
        guidance_scale=guidance_scale, feedback=[True, False, True], pool=6, epochs=2, batch=4
    )
    training, _ = training_of(config)
    objective = Landing(training)
    made = objective.round(0)
    assert made.x.shape == (2, 6, 4, 8, 8)
    assert made.weights.shape == (2,)
    assert made.scales.min() >= training.guidance[0]
    assert made.scales.max() <= training.guidance[1]
    known = made.x.flatten(0, 1)
    off, seen = 0.0, []

    def student(x: Any, timestep: Any, ahead: Any, index: Any) -> torch.Tensor:
        half = len(x) if training.guidance == (1, 1) else len(x) // 2
        places = [int((known - row).square().sum((1, 2, 3)).argmin()) for row in x[:half]]
        assert torch.equal(known[places], x[:half])
        expected = torch.tensor(training.outer.times)[[(0, 2)[p // 6] for p in places]]
        assert torch.equal(timestep[:half], expected)
        if half < len(x):
            assert index[:half].eq(training.denoiser.empty).all()
        assert torch.equal(index[-half:], made.index[[p % 6 for p in places]])
        seen.extend(places)
        wanted = made.outputs.flatten(0, 1)[places] + off
        return wanted if half == len(x) else torch.cat([wanted, wanted])

    passes = 2 * 6 // 4
    for number in range(passes):
        assert float(objective.loss(student, number)["loss"]) <= 1e-12
    assert sorted(seen) == list(range(12))  # one epoch sees every row
    off = 0.5
    seen.clear()
    loss = float(objective.loss(student, passes)["loss"])
    weights = made.weights[torch.tensor([p // 6 for p in seen])]
    assert loss == pytest.approx(0.25 * float(weights.mean()), rel=1e-4)
    # A second round has other trajectories; the first one comes back as it was.
    other = objective.round(1)
    assert not torch.equal(other.x[0], made.x[0])
    assert torch.equal(objective.round(0).outputs, made.outputs)


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_plain_outputs_have_a_loss_of_one(power: float) -> None:
    """Of all steps alike at power 0; as their misses are in the latents at power 1."""
    training, _ = training_of(settings(weight_power=power, pool=6, rollout_batch=6))
    objective = Landing(training)
    made, outer = objective.round(0), training.outer
    denoiser = training.denoiser
    missed = []
    with torch.no_grad():
        for k, time in enumerate(outer.times):
            plain = denoiser.guided(
                denoiser.output, made.x[k], torch.full_like(made.index, time), made.index,
                made.scales,
            )  # fmt: skip
            missed.append(float((plain - made.outputs[k]).square().mean()))
    weighted = made.weights * torch.tensor(missed)
    assert float(weighted.mean()) == pytest.approx(1, rel=1e-4)
    _, gains = landing_outputs(outer, [*made.x, made.x[-1]])  # gains do not depend on the states
    carried = torch.tensor([m * g * g for m, g in zip(missed, gains, strict=True)]) ** power
    torch.testing.assert_close(weighted, carried / carried.mean(), rtol=1e-3, atol=1e-5)
    # A training that goes on in a later round counts the steps as it did before.
    assert torch.equal(Landing(training).round(2).weights, made.weights)


def test_ahead_loss_is_the_error_to_the_teacher_further_on() -> None:
    config = settings(
        objective="ahead", ahead=0.5, classes=None, diffusion_weight=2.0, condition_dropout=0.5
    )
    held = latents()
    training, module = training_of(config, data=held)
    objective = Ahead(training)
    parts = objective.loss(Student(training.denoiser, module), 5)
    rows = training.draw_data(config.batch, training.rng("ahead", 5))
    alphas = training.outer.scheduler.alphas_cumprod
    model = training.denoiser.model
    labels = torch.cat([held.labels.unique(), torch.tensor([1000])])[rows.index]
    outputs = []
    with torch.no_grad():
        for times in (rows.times, rows.ahead):
            share = alphas[times].view(-1, 1, 1, 1)
            x = share.sqrt() * rows.clean + (1 - share).sqrt() * rows.noise
            outputs.append(model(x, timestep=times, class_labels=labels).sample[:, :4])
    assert all(int(a) < int(t) for a, t in zip(rows.ahead, rows.times, strict=True))
    wanted = (outputs[0] - outputs[1]).square().mean()
    noise = (outputs[0] - rows.noise).square().mean()
    torch.testing.assert_close(parts["distillation"], wanted)
    torch.testing.assert_close(parts["diffusion"], noise)
    torch.testing.assert_close(parts["loss"].detach(), wanted + 2 * noise)


def test_conditions_are_dropped_as_often_as_asked() -> None:
    training, _ = training_of(settings(classes=None, condition_dropout=0.3), data=latents())
    rows = training.draw_data(4000, training.rng("test"))
    dropped = float((rows.index == training.denoiser.empty).float().mean())
    assert dropped == pytest.approx(0.3, abs=0.03)
    assert sorted({int(t) for t in rows.times}) == sorted(training.outer.times)


def picture(path: Path, seed: int, size: tuple[int, int] = (20, 26)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def encoded(pipe: Any, path: Path) -> torch.Tensor:
    """By hand: shorter side to 16, the middle, from -1 to 1, the posterior's mean, scaled."""
    image = Image.open(path)
    scale = 16 / min(image.size)
    size = tuple(round(side * scale) for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
    pixels = np.asarray(image.crop((left, top, left + 16, top + 16)), dtype=np.float32)
    x = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        return pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor


def test_images_in_class_folders(tmp_path: Path) -> None:
    pipe = zoo.dit_pipeline()
    pipe.labels = {"goldfish": 1}
    for i in range(20):  # more than are encoded together
        picture(tmp_path / ("goldfish" if i % 2 else "7") / f"{i:02}.png", i)
    (tmp_path / "7" / "notes.txt").write_text("no picture")
    found = load_data(tmp_path, pipe)
    assert found.latents.shape == (20, 4, 8, 8)
    assert found.labels.tolist() == [7] * 10 + [1] * 10
    torch.testing.assert_close(found.latents[:1], encoded(pipe, tmp_path / "7" / "00.png"))
    torch.testing.assert_close(found.latents[-1:], encoded(pipe, tmp_path / "goldfish" / "19.png"))
    assert found.fingerprint() == load_data(tmp_path, pipe).fingerprint()
    picture(tmp_path / "cat" / "0.png", 0)
    with pytest.raises(ValueError, match="class 'cat' is unknown; allowed: numbers, or goldfish"):
        load_data(tmp_path, pipe)
    (tmp_path / "cat" / "0.png").write_bytes(b"nothing")
    (tmp_path / "cat").rename(tmp_path / "3")
    with pytest.raises(ValueError, match="a picture cannot be read"):
        load_data(tmp_path, pipe)


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl"])
def test_images_with_captions(name: str, tmp_path: Path) -> None:
    """The text encoder gets every text once; the empty one is the last."""
    pipe = PixArtSigmaPipeline.from_pretrained(REFERENCE / "pixart", dtype=torch.float32)
    for i in range(3):
        picture(tmp_path / "images" / f"{i}.png", i, (32, 32))
    texts = ["a handwritten two", "nine", "a handwritten two"]
    lines = [
        json.dumps({"file_name": f"images/{i}.png", "text": text}) for i, text in enumerate(texts)
    ]
    (tmp_path / name).write_text("\n".join([*lines, ""]))
    found = load_data(tmp_path, pipe)
    assert found.prompts == texts
    denoiser = PixArtDenoiser(pipe, found, None, None, 32, CPU)
    assert denoiser.index.tolist() == [0, 1, 0]
    for i, text in enumerate(["a handwritten two", "nine", ""]):
        states, mask, *_ = pipe.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=32, device=CPU
        )
        torch.testing.assert_close(denoiser.table["encoder_hidden_states"][i : i + 1], states)
        assert torch.equal(denoiser.table["encoder_attention_mask"][i : i + 1], mask)
    (tmp_path / name).write_text('{"file_name": "images/0.png"}\n')
    with pytest.raises(ValueError, match=f"{name}, line 1 has file_name; needed: file_name, and"):
        load_data(tmp_path, pipe)
    (tmp_path / name).write_text('{"file_name": "9.png", "text": "nine"}\n')
    with pytest.raises(FileNotFoundError, match=r"9\.png"):
        load_data(tmp_path, pipe)
    for line, message in (
        ("{", "is not valid JSON"), ("[1]", r"is \[1\]; needed: a mapping"),
        ('{"file_name": "../9.png", "text": "nine"}', "allowed: a file in the folder"),
        ('{"file_name": "/9.png", "text": "nine"}', "allowed: a file in the folder"),
        ('{"file_name": 9, "text": "nine"}', "file_name is 9; allowed"),
    ):  # fmt: skip
        (tmp_path / name).write_text(f"{line}\n")
        with pytest.raises(ValueError, match=message):
            load_data(tmp_path, pipe)


def test_a_datasets_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pipe = zoo.dit_pipeline()
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": files, "label": [4, 2, 4]}, features=columns)
    rows.save_to_disk(str(tmp_path / "rows"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
    for name in ("rows", "splits"):
        found = load_data(tmp_path / name, pipe)
        assert found.labels.tolist() == [4, 2, 4]
        torch.testing.assert_close(found.latents[1:2], encoded(pipe, tmp_path / "1.png"))
    rows.rename_column("label", "kind").save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="has the columns image, kind; needed: image, and one of"):
        load_data(tmp_path / "other", pipe)


def test_a_datasets_folder_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        data.importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name)
    )
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ImportError, match="pip install datasets"):
        load_data(tmp_path, zoo.dit_pipeline())


def test_files_of_latents(tmp_path: Path) -> None:
    pipe = zoo.dit_pipeline()
    values = zoo.normal(5, 4, 8, 8)
    labels = torch.tensor([1, 5, 1, 9, 5])
    save_file({"latents": values[:2], "labels": labels[:2]}, tmp_path / "a.safetensors")
    save_file({"latents": values[2:], "labels": labels[2:]}, tmp_path / "b.safetensors")
    one = load_data(tmp_path / "a.safetensors", pipe)
    assert torch.equal(one.latents, values[:2])
    both = load_data(tmp_path, pipe)
    assert torch.equal(both.latents, values)
    assert torch.equal(both.labels, labels)
    training, _ = training_of(settings(classes=None), pipe, both)
    assert training.denoiser.table["class_labels"].tolist() == [1, 5, 9, 1000]
    assert training.denoiser.index.tolist() == [0, 1, 0, 2, 1]
    with pytest.raises(FileNotFoundError, match="neither a folder nor a"):
        load_data(tmp_path / "c.safetensors", pipe)
    save_file({"latents": values}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="holds latents; needed: latents, and labels or"):
        load_data(tmp_path, pipe)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images in class folders and no metadata"):
        load_data(tmp_path / "empty", pipe)


def test_latents_with_caption_embeddings(tmp_path: Path) -> None:
    pipe = zoo_pixart.sigma_pipeline()
    held = {
        "latents": zoo.normal(2, 4, 8, 8),
        "encoder_hidden_states": zoo.normal(2, 7, 20, seed=2),
        "encoder_attention_mask": zoo_pixart.caption_mask(2),
    }
    save_file(held, tmp_path / "a.safetensors")
    found = load_data(tmp_path / "a.safetensors", pipe)
    with pytest.raises(ValueError, match=r"has no text encoder; .*empty_hidden_states"):
        PixArtDenoiser(pipe, found, None, None, None, CPU)
    empty = {
        "empty_hidden_states": zoo.normal(1, 7, 20, seed=3),
        "empty_attention_mask": zoo_pixart.caption_mask(1),
    }
    save_file({**held, **empty}, tmp_path / "a.safetensors")
    denoiser = PixArtDenoiser(
        pipe, load_data(tmp_path / "a.safetensors", pipe), None, None, None, CPU
    )
    x, times = held["latents"], torch.tensor([30, 700])
    # Both halves in one call, guidance of each row its own.
    scale = torch.tensor([2.0, 3.5])
    with torch.no_grad():
        ours = denoiser.guided(denoiser.output, x, times, denoiser.index, scale)
        halves = [
            pipe.transformer(
                x, encoder_hidden_states=states.expand(2, -1, -1), timestep=times,
                encoder_attention_mask=mask.expand(2, -1),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample[:, :4]
            for states, mask in (
                (empty["empty_hidden_states"], empty["empty_attention_mask"]),
                (held["encoder_hidden_states"], held["encoder_attention_mask"]),
            )
        ]  # fmt: skip
    expected = halves[0] + scale.view(-1, 1, 1, 1) * (halves[1] - halves[0])
    torch.testing.assert_close(ours, expected)


def test_the_size_is_told_to_a_model_that_asks() -> None:
    pipe = zoo_pixart.alpha_pipeline()
    held = {
        "states": zoo.normal(1, 7, 20), "mask": zoo_pixart.caption_mask(1),
        "empty_states": zoo.normal(1, 7, 20), "empty_mask": zoo_pixart.caption_mask(1),
    }  # fmt: skip
    denoiser = PixArtDenoiser(
        pipe, LatentData(zoo.normal(1, 4, 128, 128), embeddings=held), None, None, None, CPU
    )
    given = denoiser.arguments(zoo.normal(3, 4, 16, 24), {"encoder_hidden_states": held["states"]})
    assert given["added_cond_kwargs"]["resolution"].tolist() == [[128.0, 192.0]] * 3
    assert given["added_cond_kwargs"]["aspect_ratio"].flatten().tolist() == pytest.approx(
        [2 / 3] * 3
    )


def test_data_that_is_wrong() -> None:
    with pytest.raises(ValueError, match="conditions are given as nothing; allowed: one of"):
        LatentData(zoo.normal(2, 4, 8, 8))
    with pytest.raises(ValueError, match="given as labels, prompts"):
        latents(2, labels=torch.ones(2), prompts=["a", "b"])
    with pytest.raises(ValueError, match="3 prompts for 2 latents"):
        latents(2, prompts=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"latents are \[0, 4, 8, 8\]"):
        latents(0, prompts=[])
    held = LatentData(zoo.normal(2, 4, 6, 8), labels=torch.ones(2))
    with pytest.raises(ValueError, match=r"\[4, 6, 8\]; DiTPipeline has \[4, 8, 8\]"):
        training_of(settings(classes=None), data=held)
    with pytest.raises(ValueError, match="needs a class for each sample"):
        training_of(settings(classes=None), data=latents(2, prompts=["a", "b"]))


def test_chunks_cover_everything() -> None:
    rows = list(range(7))
    assert [rows[part] for part in chunks(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
