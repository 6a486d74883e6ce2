"""Whatever a file of settings holds: it is read, or refused by a ValueError that names it."""

from __future__ import annotations

import ast
import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
import yaml
from diffusers import ModelMixin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from accelrt import Config, Rehash
from accelrt.cli.scenarios import load_pipeline
from accelrt.config import RECOMPUTE
from accelrt.feedback import FeedbackModule, FeedbackSchedule
from accelrt.feedback.training.config import DistillConfig
from accelrt.files import write_text
from accelrt.planning.folder import from_folder
from accelrt.steps import Calibration, Interval, LearnedLinear, Schedule, Taylor
from accelrt.steps.rehash import Origin
from accelrt.wrap import feedback_of

PACKAGE = Path(__file__).resolve().parent.parent / "accelrt"
# The same examples in every run.
FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

length = st.none() | st.integers(1, 10**6)
configs = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            ("frames_per_slice", "pixels_per_slice", "ff_rows", "samples_per_slice", "vae_images",
             "samples_per_pass"),
            length,
        ),
        "slice_mib": st.none() | st.floats(1e-3, 1e5) | st.integers(1, 10**5),
        "memory_budget": st.none() | st.integers(1, 2**50)
        | st.sampled_from(["auto", "min", "4GiB", " 3.5 gb", "512 MiB"]),
        "recompute": st.sampled_from(RECOMPUTE),
        "bands": st.booleans(), "inplace": st.booleans(), "fuse": st.booleans(),
    },
)  # fmt: skip
plain = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["auto", "9" * 400 + "GiB", "../x", "taylor", 10**400, -1, 0, 1e308])
)  # fmt: skip
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)

SCHEDULE = Rehash(
    Schedule((0, 2, 3), steps=5), LearnedLinear({1: (1.0,), 4: (0.5, 0.5)}), "out",
    max_cache="64MiB", origin=Origin("A", "0", "B", "1", 5, (1.0, 2.0)),
).to_dict()  # fmt: skip
INTERVAL = Rehash(Interval(2), Taylor(2)).to_dict()
FEEDBACK = FeedbackSchedule(20, (True, False), (999, 400), 0.5).to_dict()
DISTILL = DistillConfig(outer=2, timesteps=(999, 400), guidance_scale=(1.0, 4.0)).to_dict()


@FUZZ
@given(configs)
def test_configs_go_round(given_values: dict[str, Any]) -> None:
    config = Config.from_dict(given_values)
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for key, value in given_values.items():
        assert getattr(config, key) == value


@FUZZ
@given(configs, st.sampled_from([".json", ".yaml", ".yml"]))
def test_config_files_go_round(tmp_path: Path, given_values: dict[str, Any], suffix: str) -> None:
    path = tmp_path / f"config{suffix}"
    config = Config.from_dict(given_values)
    dump = json.dumps if suffix == ".json" else yaml.safe_dump
    path.write_text(dump(config.to_dict()), encoding="utf-8")
    assert Config.from_file(path) == config


@FUZZ
@given(st.sampled_from(sorted(Config().to_dict())), values)
def test_wrong_values_are_named(key: str, value: Any) -> None:
    message = ""
    try:
        Config.from_dict({key: value})
    except ValueError as error:
        message = str(error)
    assert not message or (key in message and "allowed" in message)


def _places(document: Any) -> list[tuple[Any, ...]]:
    """The paths to all values inside nested dicts and lists."""
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, (list, tuple)):
        items = enumerate(document)
    return [()] + [(key, *path) for key, inner in items for path in _places(inner)]


def changed(data: st.DataObject, document: Any) -> Any:
    """The document with one value replaced, left out, or added."""
    document = json.loads(json.dumps(document))
    path = data.draw(st.sampled_from(_places(document)))
    if not path:
        return data.draw(values)
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    how = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if how == "replace" or isinstance(owner, list):
        owner[path[-1]] = data.draw(values)
    elif how == "remove":
        del owner[path[-1]]
    else:
        owner[data.draw(st.text(max_size=5))] = data.draw(values)
    return document


def refused_or_read(load: Callable[[Path], Any], path: Path) -> Any:
    """The only exception is a ValueError that names the file."""
    message = ""
    try:
        return load(path)
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    return None


@pytest.mark.parametrize(
    ("load", "name", "document"),
    [
        (Rehash.load, "schedule.json", SCHEDULE),
        (Rehash.load, "schedule.json", INTERVAL),
        (Config.from_file, "config.yaml", Config(memory_budget="4GiB").to_dict()),
        (Config.from_file, "config.json", Config().to_dict()),
        (DistillConfig.from_file, "distill.yaml", DISTILL),
        (DistillConfig.from_file, "distill.json", DISTILL),
    ],
    ids=["schedule", "interval", "config-yaml", "config-json", "distill-yaml", "distill-json"],
)
def test_changed_files(tmp_path: Path, load: Any, name: str, document: dict[str, Any]) -> None:
    path = tmp_path / name

    @FUZZ
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        dump = json.dumps if path.suffix == ".json" else yaml.safe_dump
        try:
            text = dump(changed(data, document))
        except ValueError:  # more digits than Python writes
            return
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        made = refused_or_read(load, path)
        if made is not None:  # what is read can be written again
            assert type(made).from_dict(json.loads(json.dumps(made.to_dict()))) == made

    path.write_text(json.dumps(document), encoding="utf-8")  # of which every YAML parser reads
    assert load(path).to_dict() == document
    fuzz()


HOSTILE = {
    "bytes": b"\xff\xfe\x00",
    "nul": b"\x00",
    "deep list": b"[" * 100_000,
    "deep list, closed": b"[" * 900 + b"]" * 900,
    "deep mapping": b'{"a":' * 100_000,
    "many digits": b'{"ff_rows": ' + b"9" * 5000 + b"}",
    "infinity": b'{"slice_mib": Infinity}',
    "empty": b" ",
    "aliases": b"a: &a [x, x]\nb: &b [*a, *a]\nff_rows: [*b, *b]\n",
    "an alias": b"ff_rows: &a 3\nvae_images: *a\n",
    "its own alias": b"&a [*a]",
    "two documents": b"--- 1\n--- 2\n",
    "python object": b"!!python/object/apply:os.getcwd []",
    "python call": b"ff_rows: !!python/object/apply:builtins.int ['3']",
    "python name": b"ff_rows: !!python/name:os.getcwd",
    "tagged int": b"ff_rows: !!int ''",
    "tagged bool": b"fuse: !!bool maybe",
    "tagged date": b"ff_rows: !!timestamp tomorrow",
    "date": b"ff_rows: 2020-99-99",
    "merge": b"<<: 3",
    "list as key": b"? [1]\n: 2",
    "pickle": pickle.dumps({"ff_rows": 3}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(tmp_path: Path, content: bytes) -> None:
    readers: list[tuple[str, Callable[[Path], Any]]] = [
        ("a.json", Config.from_file), ("a.yaml", Config.from_file),
        ("a.yaml", DistillConfig.from_file), ("a.json", Rehash.load), ("a.json", Calibration.load),
    ]  # fmt: skip
    for name, load in readers:
        path = tmp_path / name
        path.write_bytes(content)
        made = refused_or_read(load, path)
        assert made is None or (name == "a.yaml" and not content.strip())


@FUZZ
@given(st.binary(max_size=40))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    for name, load in (("a.yaml", Config.from_file), ("a.json", Rehash.load)):
        (tmp_path / name).write_bytes(content)
        refused_or_read(load, tmp_path / name)


@FUZZ
@given(st.data())
def test_feedback_schedules(data: st.DataObject) -> None:
    try:
        made = FeedbackSchedule.from_dict(20, changed(data, FEEDBACK))
    except ValueError:
        return
    assert FeedbackSchedule.from_dict(20, made.to_dict()) == made


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("module")
    block = {
        "dim": 8, "num_attention_heads": 2, "attention_head_dim": 4,
        "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero",
        "num_embeds_ada_norm": 5, "norm_elementwise_affine": False,
    }  # fmt: skip
    FeedbackModule(
        block_config=block, width=8, length=2, schedules={"20": FEEDBACK}
    ).save_pretrained(folder)
    assert feedback_of(folder) is not None
    return folder


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"block_class": "Linear"}, "block_class is 'Linear'"),
        ({"block_config": [1]}, "block_config is not one of BasicTransformerBlock"),
        ({"block_config": {"dimension": 8}}, "block_config is not one of"),
        ({"width": 9}, "holds no module|misses"),
        ({"width": "8"}, "width is '8'"),
        ({"enters": ["every"]}, "enters is"),
        ({"learned_scale": "yes"}, "learned_scale is 'yes'"),
        ({"schedules": [1]}, r"schedules are \[1\]"),
        ({"schedules": {"../20": FEEDBACK}}, "schedules are"),
        ({"schedules": {"20": [True]}}, "a schedule is a mapping"),
        ({"schedules": {"20": {**FEEDBACK, "timesteps": ["a", "b"]}}}, "timesteps are"),
        ({"schedules": {"20": {**FEEDBACK, "ahead": "0"}}}, "ahead is '0'"),
    ],
)
def test_changed_feedback_folders(
    module_folder: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    for file in module_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    with pytest.raises(ValueError, match=match) as error:
        feedback_of(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_feedback_folders_with_other_files(module_folder: Path, tmp_path: Path) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    config = (module_folder / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    # Pickled weights are not read.
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"scales": 1}))
    for read in (feedback_of, FeedbackModule.from_pretrained):
        with pytest.raises(ValueError, match=rf"has no {weights}"):
            read(tmp_path)
    content = (module_folder / weights).read_bytes()
    for odd in (b"", content[:-40], b"\xff" * 100):
        (tmp_path / weights).write_bytes(odd)
        with pytest.raises((ValueError, OSError), match=str(tmp_path)):
            feedback_of(tmp_path)
    (tmp_path / weights).write_bytes(content)
    for odd in (b"{", b"[]", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(odd)
        with pytest.raises((ValueError, OSError), match=str(tmp_path)):
            feedback_of(tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    assert feedback_of(tmp_path) is not None
    # An index says in which files the weights are.
    index = {"metadata": {}, "weight_map": {"scales": f"{module_folder}/{weights}"}}
    (tmp_path / f"{weights}.index.json").write_text(json.dumps(index), encoding="utf-8")
    for read in (feedback_of, FeedbackModule.from_pretrained):
        with pytest.raises(ValueError, match="allowed: one file"):
            read(tmp_path)
    nested = FeedbackModule.from_pretrained(module_folder.parent, subfolder=module_folder.name)
    assert isinstance(nested, FeedbackModule)
    with pytest.raises(OSError, match=r"config\.json"):
        FeedbackModule.from_pretrained(tmp_path / "none", local_files_only=True)


def test_feedback_modules_of_the_hub_are_not_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ModelMixin, "from_pretrained", lambda name, **more: asked.update(more))
    FeedbackModule.from_pretrained("owner/name", use_safetensors=False)
    assert asked == {"use_safetensors": True}


def test_pipelines_are_not_unpickled(tmp_path: Path) -> None:
    """Not even by torch's restricted reader."""
    zoo.dit_pipeline().save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path), "fp32", "cpu") is not None
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors"):
        load_pipeline(str(tmp_path), "fp32", "cpu")


def test_a_module_makes_nothing_but_schedulers() -> None:
    for name in ("DiTTransformer2DModel", "utils", "../x", "logging"):
        module = FeedbackModule(
            block_config={"dim": 8, "num_attention_heads": 2, "attention_head_dim": 4}, width=8,
            scheduler_class=name,
        )  # fmt: skip
        with pytest.raises(ValueError, match="allowed: a scheduler of diffusers"):
            module.scheduler()


def test_folders_of_pipelines_name_only_what_is_in_them(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"_class_name": "AutoencoderKL"}', encoding="utf-8")
    folder = tmp_path / "pipeline"
    folder.mkdir()
    cases: dict[str, Any] = {
        "elsewhere": {"../other": ["diffusers", "AutoencoderKL"]},
        "absolute": {str(other): ["diffusers", "AutoencoderKL"]},
        "no class": {"vae": ["diffusers", 3]},
        "unknown class": {"vae": ["diffusers", "Nothing"]},
        "a list": [1],
    }
    for name, index in cases.items():
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(ValueError, match=str(folder)):
            print(name, from_folder(folder, torch.float32))
    index = {"vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(OSError, match=r"config\.json"):
        from_folder(folder, torch.float32)


def test_a_schedule_by_its_folder(tmp_path: Path) -> None:
    """As `accelrt calibrate --out FOLDER` leaves it; what is wrong there is told of the file."""
    rehash = Rehash.from_dict(SCHEDULE)
    rehash.save(tmp_path / "schedule.json")
    assert Rehash.load(tmp_path) == Rehash.load(str(tmp_path)) == rehash
    (tmp_path / "schedule.json").write_text("{")
    with pytest.raises(ValueError, match=r"schedule\.json: not valid JSON"):
        Rehash.load(tmp_path)
    (tmp_path / "schedule.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"schedule\.json"):
        Rehash.load(tmp_path)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "schedule.json"
    old = Rehash(Interval(3), Taylor(1))
    old.save(path)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    stock = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        stock(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            Rehash(Interval(2), Taylor(2)).save(path)
    assert Rehash.load(path) == old
    assert sorted(tmp_path.iterdir()) == [link, path]
    new = Rehash(Interval(2), Taylor(2))
    new.save(link)
    assert link.is_symlink()
    assert Rehash.load(path) == Rehash.load(link) == new
    with pytest.raises(FileNotFoundError, match=f"directory: '{tmp_path / 'none' / 'a.json'}'"):
        new.save(tmp_path / "none" / "a.json")
    write_text("/dev/null", "nothing")
    assert not Path("/dev/null").is_file()


def test_nothing_is_unpickled_or_evaluated() -> None:
    """Names and calls by which the text of a file could become code."""
    bad = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            loads = name.startswith(("pickle.load", "pickle.dump", "pickle.Unpickler", "marshal.",
                                     "shelve.", "joblib.", "cloudpickle.", "dill."))  # fmt: skip
            loads |= name in ("eval", "exec", "compile", "__import__", "yaml.load",
                              "yaml.full_load", "yaml.unsafe_load")  # fmt: skip
            loads |= name in ("torch.load", "torch.save")  # pickles, if restricted ones
            loads |= name.endswith("np.load") and options.get("allow_pickle", "False") != "False"
            loads |= options.get("trust_remote_code", "False") != "False"
            if name.endswith(".from_pretrained") and "config_class" not in name:
                passed_on = name == "super().from_pretrained"  # FeedbackModule sets it
                loads |= not passed_on and options.get("use_safetensors") != "True"
            if loads:
                bad.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {name}")
    assert not bad


def test_defaults_are_not_shared() -> None:
    config = DistillConfig()
    values = copy.deepcopy(config.to_dict())
    config.to_dict()["scheduler_options"]["solver_order"] = 3
    assert DistillConfig().to_dict() == config.to_dict() == values
