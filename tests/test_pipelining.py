"""Slices that overlap: the same bits, and no two accesses of a byte without an order.

On the CPU streams only note their order (stream_races.py); on a GPU the same models run on streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import graphs_common
import model_zoo as zoo
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder
from graphs_common import backends  # noqa: F401
from model_zoo import one_thread  # noqa: F401
from stream_races import SIDE, Races, RecordingStreams, watching
from torch import Tensor

import accelrt
from accelrt.config import Config
from accelrt.groups import bands, modulated, pipelining, resnet, slicing, temporal_resnet
from accelrt.memory import PeakTracker, arena, track_peak

CONFIGS: dict[str, dict[str, Any]] = {
    "slices": {
        "frames_per_slice": 1, "pixels_per_slice": 7, "ff_rows": 5, "samples_per_slice": 1,
    },
    "uneven": {
        "frames_per_slice": 2, "pixels_per_slice": 11, "ff_rows": 9, "inplace": False,
    },
    "unfused": {"frames_per_slice": 1, "pixels_per_slice": 13, "ff_rows": 7, "fuse": False},
    "bands": {"bands": True, "slice_mib": 0.002},
    "recompute": {
        "bands": True, "slice_mib": 0.002, "recompute": "always", "samples_per_pass": 1,
    },
    "min": {"memory_budget": "min"},
    "arena": {
        "frames_per_slice": 1, "pixels_per_slice": 7, "ff_rows": 5, "memory_budget": "1GiB",
    },
}  # fmt: skip


def video_vae() -> AutoencoderKLTemporalDecoder:
    return zoo.randomise(
        AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 64, 64),  # outputs go over those before
            down_block_types=("DownEncoderBlock2D",) * 3,
            layers_per_block=1,
        )
    )


def _decoded(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.decode(inputs["z"], **{k: v for k, v in inputs.items() if k != "z"}).sample


def _encoded(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.encode(inputs["x"]).latent_dist.mean


# Small ones of every family: the finder takes a hundred times as long as the model.
DENOISERS = ("animatediff-small", "svd", "unet2d", "dit", "pixart")
Case = tuple[Callable[[], Any], Callable[[], dict[str, Any]], Callable[..., Tensor]]
CASES: dict[str, Case] = {
    **{name: (*graphs_common.MODELS[name], graphs_common.call) for name in DENOISERS},
    "vae": (zoo.tiny_vae, lambda: {"z": zoo.normal(5, 4, 6, 10)}, _decoded),
    "vae-encoder": (zoo.tiny_vae, lambda: {"x": zoo.normal(5, 3, 12, 20)}, _encoded),
    "video-vae": (video_vae, lambda: {"z": zoo.normal(6, 4, 4, 6), "num_frames": 3}, _decoded),
}  # fmt: skip


def matrix() -> list[tuple[str, str]]:
    """Every model with what changes the loops most, every setting with some model."""
    found = [(name, config) for name in CASES for config in ("slices", "bands", "arena")]
    found += [(name, "uneven") for name in ("animatediff-small", "svd", "vae", "video-vae")]
    found += [(name, "unfused") for name in ("animatediff-small", "dit", "unet2d", "video-vae")]
    return [*found, ("video-vae", "recompute"), ("pixart", "recompute"), ("unet2d", "min")]


def settings_of(config: str) -> dict[str, Any]:
    """The images of a VAE go together, so that there is more than one slice."""
    return {"vae_images": None, **CONFIGS[config], "pipeline_slices": True}


@contextmanager
def on_streams(streams: RecordingStreams) -> Iterator[RecordingStreams]:
    """Slices on the CPU overlap on these."""
    before = pipelining.use_streams(streams)
    try:
        yield streams
    finally:
        pipelining.use_streams(before)


def watched(name: str, config: str) -> tuple[RecordingStreams, Races, Tensor, Tensor]:
    """A call of a model with streams, and the output of the next one, by the same plan, without."""
    build, inputs, run = CASES[name]
    model = accelrt.wrap(build(), **settings_of(config))
    with watching() as (streams, races):
        found = run(model, inputs())
    return streams, races, found, run(model, inputs())


@pytest.mark.parametrize(("name", "config"), matrix())
def test_every_model_has_the_same_bits_and_an_order(name: str, config: str) -> None:
    streams, races, found, plain = watched(name, config)
    assert races.found == {}
    assert streams.joined
    assert torch.equal(found, plain)
    assert sum(races.operators) > 0
    if config == "bands" or (config == "slices" and name not in ("dit", "pixart")):
        assert races.operators[SIDE] > 0


def test_both_streams_work() -> None:
    streams, races, _, _ = watched("animatediff-small", "slices")
    assert streams.loops > 20
    assert races.operators[SIDE] > 0.4 * sum(races.operators)


@pytest.mark.parametrize("name", ["animatediff-small", "video-vae"])
def test_without_the_setting_nothing_changes(name: str) -> None:
    """No streams, the same plan and the same bits; nor has it any on a device without streams."""
    build, inputs, run = CASES[name]
    outputs, plans = [], []
    for setting in (False, True):
        streams = RecordingStreams()
        streams.device_type = "cpu" if not setting else "cuda"
        model = accelrt.wrap(build(), vae_images=None, **CONFIGS["arena"], pipeline_slices=setting)
        with on_streams(streams):
            outputs.append(run(model, inputs()))
        assert streams.loops == 0
        part = getattr(model, "decoder", model)
        plans.append(next(iter(part.forward.planner.plans.values())))
    assert torch.equal(*outputs)
    assert plans[0] == plans[1]


ON = Config(pipeline_slices=True)


def marked(total: int, step: int, like: Tensor) -> Iterable[int]:
    """``starts`` as if every loop were of independent slices."""
    return slicing.independent(total, step, like, ON)


@pytest.mark.parametrize(
    ("name", "config", "module", "operator"),
    [
        ("svd", "uneven", temporal_resnet, "group_norm_stats"),  # statistics over all slices
        ("unet2d", "bands", bands, "convolution"),  # the rows before
        ("dit", "slices", modulated, "transformer_block"),  # one workspace
        ("video-vae", "slices", resnet, "residual_blend"),  # over the images before
    ],
    ids=["statistics", "rows", "workspace", "slab"],
)
def test_a_loop_that_is_wrongly_marked_is_found(
    name: str, config: str, module: ModuleType, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "starts", marked)
    _, races, _, _ = watched(name, config)
    assert any(operator in what for what in races.found), races.found


def test_buffers_of_bands_are_not_shared_by_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelrt.groups import banded_attention

    monkeypatch.setattr(banded_attention, "starts", marked)
    _, races, _, _ = watched("unet2d", "bands")
    assert races.found


@pytest.mark.parametrize("method", ["fork", "join", "born"])
def test_an_order_that_is_left_out_is_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Any, *_: Any) -> None:
        self.on.enter(self.pair[0])

    monkeypatch.setattr(pipelining._Slots, method, nothing)
    _, races, _, _ = watched("vae", "uneven")
    assert races.found


def _in_arena(count: int) -> Races:
    """Slices that each use a buffer of the arena, which go where there is room."""
    place = arena.Arena("cpu")
    place.reserve(8 * 256)
    out = torch.zeros(count, 64)
    with watching() as (_, races), arena.activate(place):
        for i in marked(count, 1, out):
            buffer = arena.empty(out.device, (1 + i % 3, 64), torch.float32)
            assert place.owns(buffer)
            buffer.fill_(i)
            out[i].copy_(buffer[-1])
            del buffer
    assert out[:, 0].tolist() == list(range(count))
    return races


def test_a_buffer_of_a_slice_stays_until_its_stream_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _in_arena(9).found == {}
    with monkeypatch.context() as patch:
        patch.setattr(pipelining._Slots, "born", lambda *_: None)
        assert _in_arena(9).found
    monkeypatch.setattr(pipelining._Slots, "_other_waits", lambda self: None)
    assert _in_arena(9).found  # held, but the other stream does not wait


def test_memory_that_outlives_a_slice_is_waited_for() -> None:
    """Made where the same stream has just freed something, and written by the other one."""
    found = []
    for tell in (arena.outlives_slice, lambda tensor: tensor):
        x = torch.ones(4, 64)
        with watching() as (_, races):
            out = None
            for i in marked(4, 1, x):
                y = x[i] * 2
                if out is None:
                    out = torch.empty(4, 64)
                    tell(out)
                out[i].copy_(y)
        assert torch.equal(out, 2 * x)
        found.append(dict(races.found))
    assert found[0] == {}
    assert found[1]


def test_the_stream_is_back_whatever_ends_a_loop() -> None:
    x = torch.ones(6)

    def raises() -> None:
        for i in marked(6, 1, x):
            x[i] += 1
            if i == 3:
                raise KeyError(i)

    def breaks() -> None:
        for i in marked(6, 1, x):
            x[i] += 1
            if i == 1:
                break

    with watching() as (streams, races):
        for run in (raises, breaks):
            try:
                run()
            except KeyError:
                assert run is raises
            assert streams.joined
            assert not pipelining.active()
            assert arena._local.births is None
            x.add_(1)
    assert streams.loops == 2
    assert races.found == {}


def test_loops_inside_a_slice_run_on_its_stream() -> None:
    x = torch.ones(4, 4)
    with watching() as (streams, races):
        for i in marked(4, 1, x):
            for j in marked(4, 1, x):
                assert streams.stream == i % 2
                x[i, j] += 1
    assert streams.loops == 1
    assert races.found == {}


def test_modules_that_are_watched_run_slice_by_slice() -> None:
    x, layer = torch.ones(4, 3), torch.nn.Sequential(torch.nn.Linear(3, 3))
    with on_streams(RecordingStreams()) as streams:
        list(slicing.independent(4, 1, x, ON, layer, None))
        assert streams.loops == 1
        handle = layer[0].register_forward_hook(lambda *_: None)
        list(slicing.independent(4, 1, x, ON, layer, None))
        handle.remove()
        list(slicing.independent(4, 4, x, ON, layer))
        list(slicing.independent(4, 1, x, Config(), layer))
        assert streams.loops == 1


class TwoSlots(RecordingStreams):
    """Measures what two slices need at once: what is alive, and the scratch of both.

    Attributes:
        peak: so far, within loops.
    """

    def __init__(self, memory: PeakTracker) -> None:
        super().__init__()
        self.memory = memory
        self.peak = self.scratch = self.base = 0

    def current(self, device: torch.device) -> int:
        self.scratch = 0
        self.base = self.memory.live_bytes
        self.peak = max(self.peak, self.memory.peak_bytes)
        self.memory.reset_peak()
        return super().current(device)

    def enter(self, stream: int) -> None:
        super().enter(stream)
        worst = self.memory.peak_bytes
        self.peak = max(self.peak, worst + self.scratch)
        live = self.memory.live_bytes  # with what outlives the slice, which is no scratch
        self.scratch = worst - max(self.base, live)
        self.base = live
        self.memory.reset_peak()


@pytest.mark.parametrize("name", ["animatediff-small", "svd", "unet2d", "video-vae"])
def test_a_plan_counts_two_slices(name: str) -> None:
    build, inputs, run = CASES[name]
    settings = settings_of("arena")
    part = (lambda model: model.decoder) if name == "video-vae" else (lambda model: model)
    model = accelrt.wrap(build(), **settings)
    given = inputs()
    with on_streams(RecordingStreams()):
        run(model, given)  # plans
    with track_peak() as memory, on_streams(TwoSlots(memory)) as streams:
        run(model, given)
        measured = max(streams.peak, memory.peak_bytes)
    (two,) = part(model).forward.planner.plans.values()
    (place,) = part(model).forward.planner.arenas
    assert place.spills == place.misplaced == 0
    assert measured == pytest.approx(two.peak_bytes, rel=0.03)
    accelrt.unwrap(model)
    accelrt.wrap(model, **{**settings, "pipeline_slices": False})
    run(model, inputs())
    (one,) = part(model).forward.planner.plans.values()
    assert one.own_bytes <= two.own_bytes <= 2 * one.own_bytes
    pairs = list(zip(one.groups, two.groups, strict=True))
    assert sum(b.own_bytes > a.own_bytes for a, b in pairs) >= 3
    assert one.slab_bytes == two.slab_bytes


def test_graphs_hold_both_streams(backends: Any) -> None:  # noqa: F811
    """A capture begins and ends on one stream, which comes after the other."""
    build, inputs, run = CASES["animatediff-small"]
    model = accelrt.wrap(build(), **settings_of("slices"), cuda_graphs=True)
    plain = accelrt.wrap(build(), **CONFIGS["slices"])
    with on_streams(RecordingStreams()) as streams:
        backends[0].inside = lambda: captured.append(streams.loops)
        captured: list[int] = []
        for seed in range(4):
            given = graphs_common.drawn(inputs(), seed)
            found = run(model, given)
            assert streams.joined
            assert torch.equal(found, run(plain, given))
        assert backends[0].captures == 1
        assert backends[0].replays == 3
        assert streams.loops > captured[0]  # in the capture, and none in a replay
        loops = streams.loops
        run(model, given)
        assert streams.loops == loops


def test_a_profile_has_the_same_groups_and_slices() -> None:
    build, inputs, run = CASES["animatediff-small"]
    rows = []
    for setting in (False, True):
        model = accelrt.wrap(build(), **CONFIGS["slices"], pipeline_slices=setting)
        with on_streams(RecordingStreams()) as streams, accelrt.profile(model) as prof:
            run(model, inputs())
        assert (streams.loops > 0) is setting
        rows.append([(row.name, row.slices, row.calls) for row in prof.rows("group")])
    assert sorted(rows[0]) == sorted(rows[1])
    assert any(slices > 2 for _, slices, _ in rows[0])


def test_the_summary_says_where_it_has_no_effect() -> None:
    model = accelrt.wrap(CASES["dit"][0](), pipeline_slices=True)
    assert "pipeline_slices has no effect on the model: it is on cpu" in str(accelrt.summary(model))
    with on_streams(RecordingStreams()):
        assert accelrt.summary(model).to_dict()["unpipelined"] == {}
    accelrt.unwrap(model)
    assert accelrt.summary(accelrt.wrap(model)).unpipelined == {}


class Stream:
    """Stands for a stream of torch, and writes down what it is asked."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name
        self.device, self.device_index, self.cuda_stream = torch.device("cuda", 1), 1, id(self)

    def record_event(self) -> str:
        return self.name

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_streams_of_torch_are_asked_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a ``torch.cuda`` that writes down: it has not run on a GPU."""
    log: list[str] = []
    main, other = Stream(log, "main"), Stream(log, "other")
    now, devices = [main], []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        devices.append(wanted)
        yield

    def set_stream(stream: Stream) -> None:
        now[0] = stream
        log.append(f"on {stream.name}")

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Stream", lambda _: Stream(log, f"beside {now[0].name}"))
    monkeypatch.setattr(cuda, "current_stream", lambda _: now[0])
    monkeypatch.setattr(cuda, "set_stream", set_stream)
    monkeypatch.setattr(cuda, "device", device)
    on = pipelining.CudaStreams()
    place = torch.device("cuda", 1)
    log.extend(f"slice {start}" for start in pipelining.overlapped(range(3), place, on))
    assert log == [
        "beside main waits for main", "on main", "slice 0", "on beside main", "slice 1",
        "on main", "slice 2", "on main", "main waits for beside main",
    ]  # fmt: skip
    assert set(devices) == {place}  # the current device stays what it was
    assert on.beside(main) is on.beside(main)
    assert on.beside(other) is not on.beside(main)


def test_the_setting_is_checked() -> None:
    assert Config().pipeline_slices is False
    with pytest.raises(ValueError, match="pipeline_slices is 'auto'; allowed: True, False"):
        Config(pipeline_slices="auto")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(("name", "config"), matrix())
def test_streams_of_a_gpu_give_the_same_bits(name: str, config: str, graphs: bool) -> None:
    build, inputs, run = CASES[name]
    model = build().to("cuda")
    given = {k: v.to("cuda") if isinstance(v, Tensor) else v for k, v in inputs().items()}
    outputs = []
    for setting in (False, True):
        settings = {**settings_of(config), "pipeline_slices": setting}
        accelrt.wrap(model, **settings, cuda_graphs="auto" if graphs else False)
        outputs.append([run(model, given) for _ in range(4)])
        torch.cuda.synchronize()
        accelrt.unwrap(model)
    for plain, found in zip(*outputs, strict=True):
        if config == "min":  # the plans differ, and so may the slices
            assert zoo.relative_error(found, plain.double()) < 1e-5
        else:
            assert torch.equal(found, plain)
