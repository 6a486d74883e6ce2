"""CUDA kernels of a build without nvcc: NVRTC on every one, the launchers, the path through CuPy.

No GPU: the compiler needs none, the launchers' calls run on the simulator, and CuPy is a stand-in
that records what it is asked for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nvrtc as nvrtc_library
import pytest
import torch
import torch.nn.functional as F
from fake_cupy import FakeCupy
from ops_common import assert_as_good_as
from sim import SimulatorError, run_simulator
from test_cuda_build import needs_nvcc, ptxas

from accelrt import _C, ops, reference
from accelrt.ops import _compile, _library, _runtime_cuda

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FOLDERS = sorted(path.parent.relative_to(CSRC).as_posix() for path in CSRC.glob("kernels/*/*.cu"))
FOLDER = "kernels/residual_blend"
KERNEL = "accelrt::residual_blend_kernel<ResidualBlendTraits<float, 1> >"


# ---- Every kernel under NVRTC ----------------------------------------------------------------


@pytest.fixture(scope="module")
def nvrtc() -> Any:
    found = nvrtc_library.load()
    if found is None:
        pytest.skip("no NVRTC (`pip install --group test` installs it)")
    return found


@pytest.fixture(scope="module")
def names(launches: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Of every folder: its kernels, as the launchers name them, and the bytes of their params."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "in").write_bytes(b"ASIM" + bytes(4))
    command = [launches, "kernel_names", "cuda", folder / "in", folder / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        folder_of_it, kernel, params_bytes = line.split("\t")
        found.setdefault(folder_of_it, {})[kernel] = int(params_bytes)
    return found


def test_every_launcher_names_its_kernels(names: dict[str, dict[str, int]]) -> None:
    assert set(names) == set(FOLDERS)
    for folder, kernels in names.items():
        assert all(kernel.startswith("accelrt::") for kernel in kernels), folder


PARAMS = r"\.entry {name}\(\s*\.param \.align \d+ \.b8 \w+\[(\d+)\]\s*\)"


@pytest.mark.parametrize("target", ["compute_80", "compute_100"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_nvrtc_compiles_every_kernel(
    nvrtc: Any, names: dict[str, dict[str, int]], folder: str, target: str
) -> None:
    """And lays its parameters out in as many bytes as the host has given the launcher."""
    kernels = names[folder]
    image, lowered = _compile.compile_kernels(nvrtc, CSRC, folder, list(kernels), target)
    assert len(set(lowered.values())) == len(kernels)
    text = image.decode()
    for kernel, params_bytes in kernels.items():
        entry = re.search(PARAMS.format(name=re.escape(lowered[kernel])), text)
        assert entry is not None, kernel
        assert int(entry[1]) == params_bytes, kernel


@needs_nvcc
def test_the_names_are_all_that_nvcc_has_built(
    nvrtc: Any, names: dict[str, dict[str, int]]
) -> None:
    entry = re.compile(r"Compiling entry function '(\S+)' for")
    built = {
        f"kernels/{Path(source).parent.name}": set(entry.findall(path.read_text()))
        for source, path in ptxas.reports(ptxas.build_folder()).items()
    }
    assert set(built) == set(names)
    for folder, entries in built.items():
        kernels = list(names[folder])
        _, lowered = _compile.compile_kernels(nvrtc, CSRC, folder, kernels, "compute_80")
        assert set(lowered.values()) == entries, folder


def test_tiles_compile(nvrtc: Any, tmp_path: Path) -> None:
    """The matrix primitives, and the standard headers of csrc/nvrtc, of which a kernel has few."""
    for folder in _compile.INCLUDES[1:]:
        (tmp_path / folder).symlink_to(CSRC / folder)
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "tiles.cuh").write_text(
        "".join(f"#include <{p.name}>\n" for p in CSRC.glob("nvrtc/*") if p.suffix != ".md")
        + """
        #include "accelrt/tile.h"
        namespace accelrt {
        template <typename T, int kSize> __global__ void tiles(const T* from, float* to) {
          static_assert(std::is_same_v<std::remove_cv_t<const T>, T> && kSize == 16);
          static_assert(std::index_sequence<3, 4>::size() == 2);
          constexpr float kLow = -std::numeric_limits<float>::infinity();
          T* shared = reinterpret_cast<T*>(shared_memory());
          copy_chunk_async(shared + 8 * threadIdx.x, from, std::min(3, 4) == 3);
          copy_commit();
          copy_wait<0>();
          __syncthreads();
          uint32_t a[4], b[2];
          load_tiles<4>(a, shared);
          load_tiles_transposed<2>(b, shared);
          float c[4] = {INFINITY, kLow, NAN, std::clamp(0.f, 1.f, 2.f)};
          multiply_tiles<T>(c, a, b);
          store_pack<4>(to, c);
        }
        }
        """
    )
    kernels = [f"tiles<{dtype}, 16>" for dtype in ("bfloat16", "float16")]
    image, lowered = _compile.compile_kernels(nvrtc, tmp_path, "tiles", kernels, "compute_80")
    text = image.decode()
    assert all(name in text for name in lowered.values())
    assert text.count("mma.sync") == 2
    assert "ldmatrix" in text
    assert "cp.async" in text


def test_machine_code_and_messages(nvrtc: Any) -> None:
    image, lowered = _compile.compile_kernels(nvrtc, CSRC, FOLDER, [KERNEL], "sm_90")
    assert image.startswith(b"\x7fELF")
    assert lowered[KERNEL].encode() in image
    with pytest.raises(RuntimeError, match=r"(?s)does not compile kernels/.*no_such_kernel"):
        _compile.compile_kernels(nvrtc, CSRC, FOLDER, ["no_such_kernel<3>"], "sm_90")


def test_target() -> None:
    known = SimpleNamespace(getSupportedArchs=lambda: [75, 80, 90, 100], getVersion=lambda: (13, 0))
    assert _compile.target_for(known, (9, 0)) == "sm_90"
    assert _compile.target_for(known, (8, 6)) == "compute_80"
    assert _compile.target_for(known, (12, 1)) == "compute_100"
    with pytest.raises(RuntimeError, match=r"capability 7.5 and later; this GPU has 7.0"):
        _compile.target_for(known, (7, 0))


# ---- The launchers, with the simulator for a GPU -----------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launchers_hand_over_all_that_a_kernel_needs(launches: Path, dtype: torch.dtype) -> None:
    def run(op: str, **arguments: Any) -> torch.Tensor:
        return run_simulator(launches, op, **arguments)["out"]

    x, bias = (torch.randn(3, 7, 64) * 2).to(dtype), torch.randn(64).to(dtype)
    result = run("activation", x=x, bias=bias, kind=0, out=torch.zeros_like(x))
    truth = reference.silu(x.double(), bias.double())
    assert_as_good_as(result, F.silu(x + bias), truth)

    result = run("layer_norm_modulate", x=x, weight=bias, eps=1e-5, out=torch.zeros_like(x))
    truth = reference.layer_norm_modulate(x.double(), bias.double())
    assert_as_good_as(result, F.layer_norm(x, (64,), bias, None, 1e-5), truth)

    # Two launches through a workspace; the partial sums are a block's, over shared memory.
    result = run("feature_delta", a=x, b=x * 2 + 1, p=2, out=torch.zeros(3))
    truth = reference.feature_delta(x.double(), (x * 2 + 1).double(), p=2)
    assert_as_good_as(result, ops.feature_delta(x, x * 2 + 1, p=2), truth)

    image = x.reshape(3, 8, 7, 8)
    stats = run(
        "group_norm_stats", x=image, num_groups=4, frames=1, accumulate=0, out=torch.zeros(3, 4, 3)
    )
    result = run(
        "group_norm_apply", x=image, stats=stats, num_groups=4, frames=1, eps=1e-5, silu=0,
        out=torch.zeros_like(image),
    )  # fmt: skip
    truth = F.group_norm(image.double(), 4)
    assert_as_good_as(result, F.group_norm(image, 4), truth)

    q, k, v = (torch.randn(1, 9, 2, 48).to(dtype) for _ in range(3))
    result = run(
        "temporal_attention", q=q, k=k, v=v, num_heads=3, scale=0.25, out=torch.zeros_like(q)
    )
    truth = reference.temporal_attention(q.double(), k.double(), v.double(), 3, scale=0.25)
    # As on tensor cores, which take probabilities in the dtype; our CPU kernel may not round them.
    heads = [t.view(9, 2, 3, 16).permute(1, 2, 0, 3).float() for t in (q, k, v)]
    scores = 0.25 * heads[0] @ heads[1].transpose(-1, -2)
    y = (scores.softmax(-1).to(dtype).float() @ heads[2]).to(dtype)
    assert_as_good_as(result, y.permute(2, 0, 1, 3).reshape(1, 9, 2, 48), truth)


def arguments_of(rows: int) -> dict[str, dict[str, Any]]:
    """A call of every operator that has CUDA kernels, on so many rows, samples or images."""
    x, y, wide = torch.ones(rows, 3, 8), torch.ones(rows, 3, 8), torch.ones(rows, 16).bfloat16()
    image, frames = torch.ones(rows, 8, 2, 4), torch.ones(rows, 5, 2, 16)
    heads, weight = torch.ones(rows, 3, 2, 8).bfloat16(), torch.ones(16, 16).bfloat16()
    stream = torch.ones(rows, 4, 16).bfloat16()
    layer = {"weight": weight, "rows_per_sample": 1, "epilogue": 0}
    block = {f"{name}_weight": weight for name in ("q", "k", "v", "out", "ff_in", "ff_out")}
    groups = {"num_groups": 2, "frames": 1}
    return {
        "activation": {"x": x, "kind": 0, "out": x.clone()},
        "attention": {"q": heads, "k": heads.clone(), "v": heads.clone(), "scale": 1.0,
                      "out": heads.clone()},
        "feature_delta": {"a": x, "b": y, "p": 2, "out": torch.zeros(rows)},
        "feed_forward": {"x": wide, "in_weight": weight, "out_weight": weight, "activation": 1,
                         "rows": 4, "add": 0, "rows_per_sample": 1, "out": wide.clone()},
        "gate_residual_layer_norm_modulate": {"x": x, "residual": y, "eps": 1e-5,
                                              "out": x.clone(), "residual_out": x.clone()},
        "geglu": {"x": x, "kind": 1, "out": torch.zeros(rows, 3, 4)},
        "group_norm_apply": {"x": image, "stats": torch.ones(rows, 2, 3), "eps": 1e-5, "silu": 0,
                             "out": image.clone(), **groups},
        "group_norm_stats": {"x": image, "accumulate": 0, "out": torch.zeros(rows, 2, 3),
                             **groups},
        "guided_step": {"sample": x, "cond": y, "guidance_scale": 1.0, "sample_coef": 1.0,
                        "eps_coef": 1.0, "history_coef": 0.0, "out": x.clone()},
        "layer_norm_modulate": {"x": x, "eps": 1e-5, "out": x.clone()},
        "linear": {"x": wide, "out": wide.clone(), **layer},
        "residual_blend": {"x": x, "y": y, "scale": 1.0, "out": x.clone()},
        "temporal_attention": {"q": frames, "k": frames.clone(), "v": frames.clone(),
                               "num_heads": 2, "scale": 1.0, "out": frames.clone()},
        "transformer_block": {"stream": stream, "modulation": torch.ones(rows, 6, 16).bfloat16(),
                              "heads": 2, "scale": 1.0, "heads_per_slice": 0, "activation": 1,
                              "ff_rows": 0, **block},
        "weighted_sum": {"features": torch.ones(2, rows, 3, 8), "weights": torch.ones(rows, 2),
                         "out": x.clone()},
    }  # fmt: skip


NO_KERNELS = {"arena", "conv2d", "kernel_names"}  # conv2d: torch's, on a GPU


def test_nothing_is_launched_for_empty_tensors(launches: Path) -> None:
    """And something for one row. Which operators there are the program says."""
    usage = subprocess.run([launches], capture_output=True, text=True).stderr
    known = set(usage.rpartition("operators:")[2].split())
    assert set(arguments_of(0)) == known - NO_KERNELS
    for rows in (0, 1):
        for op, arguments in arguments_of(rows).items():
            launched: list[str] = []
            run_simulator(launches, op, printed=launched, **arguments)
            assert bool(launched) == bool(rows), f"{op}, {rows} rows: {launched}"


def test_without_a_launcher(launches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELRT_NO_LAUNCHER", "1")
    x = torch.zeros(2, 8)
    with pytest.raises(SimulatorError, match=r"activation: .*no kernel launcher is registered"):
        run_simulator(launches, "activation", x=x, kind=0, out=torch.zeros_like(x))


# ---- Python: through C++, to CuPy --------------------------------------------------------------


def launch(
    kernel: str = KERNEL, *, shared_bytes: int = 0, stream: int = 5, params: bytes = b"params"
) -> None:
    """As a launcher in C++ does it."""
    _C.launch_kernel("blend", FOLDER, kernel, (1, 2, 3), 64, shared_bytes, stream, params)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    fake = FakeCupy()
    fake.cuda.driver.params_bytes = len(b"params")
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(_runtime_cuda, "_active", None)
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _C.set_kernel_launcher(_runtime_cuda.launch, _runtime_cuda.attribute)
    yield fake
    _C.set_kernel_launcher(None, None)
    _runtime_cuda.register()


def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime_cuda, "_active", None)


def test_launches_as_asked(cupy: Any) -> None:
    launch()
    launch(stream=6, params=b"others")
    driver = cupy.cuda.driver
    assert driver.loaded == [(b"cubin\n\0" + KERNEL.encode(), f"lowered {KERNEL}")]
    assert driver.launched == [
        (1, 1, 2, 3, 64, 1, 1, 0, 5, b"params"),
        (1, 1, 2, 3, 64, 1, 1, 0, 6, b"others"),
    ]
    (options,) = cupy.cuda.nvrtc.options
    assert "--gpu-architecture=sm_90" in options
    assert f"-I{CSRC}/include" in options
    assert not cupy.devices


def test_a_thread_without_a_context_gets_the_devices(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy.cuda.driver.context = 0
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch()
    assert cupy.devices == [1]


def test_devices_have_their_own_modules(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launch()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch()
    launch()
    assert [call[0] for call in cupy.cuda.driver.launched] == [1, 2, 2]
    assert len(cupy.cuda.nvrtc.options) == 1  # of one architecture


def test_attributes_are_the_current_devices(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [_C.device_attribute(16), _C.device_attribute(38)] == [1600, 3800]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [_C.device_attribute(16) for _ in range(3)] == [1601] * 3
    assert cupy.asked == [(16, 0), (38, 0), (16, 1)]  # each once


def test_shared_memory_above_the_default_is_asked_for(cupy: Any) -> None:
    for shared_bytes in (48 * 1024, 60_000, 50_000, 60_000, 70_000):
        launch(shared_bytes=shared_bytes)
    assert cupy.cuda.driver.attributes == [(1, 8, 60_000), (1, 8, 70_000)]
    assert [call[7] for call in cupy.cuda.driver.launched][1:3] == [60_000, 50_000]


def test_compiled_once_and_kept_on_disk(
    cupy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled = cupy.cuda.nvrtc.options
    launch()
    (file,) = (tmp_path / "cache" / "kernels").iterdir()  # and nothing unfinished
    assert file.name.startswith("residual_blend-sm_90-")
    as_in_a_new_process(monkeypatch)
    launch()
    assert len(compiled) == 1
    assert cupy.cuda.driver.loaded[0] == cupy.cuda.driver.loaded[1]

    whole = file.read_bytes()
    for damaged in (b"", whole[:40], whole[:-1], whole[:-1] + b"?"):
        before = len(compiled)
        file.write_bytes(damaged)
        as_in_a_new_process(monkeypatch)
        launch()
        assert len(compiled) == before + 1
        assert file.read_bytes() == whole

    for change in ("version", "architecture", "kernel", "sources"):
        before = len(compiled)
        as_in_a_new_process(monkeypatch)
        with monkeypatch.context() as m:
            if change == "version":
                m.setattr(cupy.cuda.nvrtc, "getVersion", lambda: (13, 1))
            elif change == "architecture":
                m.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
            elif change == "sources":
                m.setattr(_runtime_cuda, "sources_digest", lambda folder: "other")
            launch("other" if change == "kernel" else KERNEL)
        assert len(compiled) == before + 1, change


def test_sources_digest_notices_every_file(tmp_path: Path) -> None:
    for path in _compile.source_files(CSRC):
        copy = tmp_path / path.relative_to(CSRC)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    digest = _compile.sources_digest(CSRC)
    assert _compile.sources_digest(tmp_path) == digest
    for name in ("nvrtc/cstdint", "include/accelrt/device.h", f"{FOLDER}/residual_blend.cuh"):
        with open(tmp_path / name, "a", encoding="utf-8") as file:
            file.write("\n")
        changed = _compile.sources_digest(tmp_path)
        assert changed != digest
        digest = changed


def test_sources_are_found_in_a_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _compile.source_folder() == CSRC  # of this tree, as of an editable install
    module = tmp_path / "accelrt" / "ops" / "_compile.py"
    monkeypatch.setattr(_compile, "__file__", str(module))
    with pytest.raises(RuntimeError, match="install accelrt again"):
        _compile.source_folder()
    (tmp_path / "accelrt" / "_csrc" / "kernels").mkdir(parents=True)
    assert _compile.source_folder() == tmp_path / "accelrt" / "_csrc"


def test_a_cache_that_cannot_be_written(
    cupy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="ACCELRT_CACHE_DIR chooses another folder"):
        launch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch("another")
    assert len(cupy.cuda.driver.launched) == 2


def test_the_cache_is_in_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELRT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _compile.cache_folder() == Path("/somewhere/accelrt/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _compile.cache_folder() == Path.home() / ".cache" / "accelrt" / "kernels"


def test_threads_compile_a_kernel_once(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = threading.Event()
    others = threading.Barrier(4)
    compile_program = cupy.cuda.nvrtc.compileProgram

    def slow(program: Any, options: tuple[str, ...]) -> None:
        inside.wait(10)
        compile_program(program, options)

    monkeypatch.setattr(cupy.cuda.nvrtc, "compileProgram", slow)

    def work() -> None:
        others.wait()
        launch()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    others.wait()
    inside.set()
    for thread in threads:
        thread.join()
    assert len(cupy.cuda.nvrtc.options) == 1
    assert len(cupy.cuda.driver.launched) == 3


def test_real_compiler_behind_the_stand_in(cupy: Any, nvrtc: Any) -> None:
    cupy.cuda.nvrtc = nvrtc
    launch()
    ((image, name),) = cupy.cuda.driver.loaded
    assert image.startswith(b"\x7fELF")
    assert name.startswith("_ZN7accelrt21residual_blend_kernel")


def test_cupy_shares_the_pool_of_torch(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def allocate(size: int, device: int, stream: int) -> int:
        calls.append((size, device, stream))
        return 4096

    monkeypatch.setattr(torch.cuda, "caching_allocator_alloc", allocate)
    monkeypatch.setattr(torch.cuda, "caching_allocator_delete", lambda p: calls.append((p,)))
    assert cupy.allocator is cupy.pool.malloc  # until a kernel is launched
    launch()
    ours, free = cupy.allocator
    assert ours(1000, 1) == 4096
    free(4096, 1)
    assert calls == [(1000, 1, 77), (4096,)]


def test_an_allocator_of_the_program_stays(cupy: Any) -> None:
    cupy.allocator = chosen = object()
    launch()
    assert cupy.allocator is chosen


def test_without_cupy(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RuntimeError, match=r"blend: .*`pip install cupy-cuda13x nvidia-.*nvrtc`"):
        launch()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(RuntimeError, match=r"`pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12`"):
        launch()
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # installed meanwhile
    launch()
    assert len(cupy.cuda.driver.launched) == 1


def test_without_nvrtc(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[int, int]:
        raise RuntimeError("libnvrtc.so.13: cannot open")

    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", missing)
    with pytest.raises(RuntimeError, match=r"no NVRTC \(libnvrtc.*`pip install nvidia-cuda-nvrtc"):
        launch()
    assert cupy.allocator is cupy.pool.malloc


def test_no_launcher_is_registered() -> None:
    _C.set_kernel_launcher(None, None)
    try:
        with pytest.raises(RuntimeError, match=r"blend: .*no kernel launcher is registered"):
            launch()
        with pytest.raises(RuntimeError, match=r"attribute 16 .*no kernel launcher"):
            _C.device_attribute(16)
    finally:
        _runtime_cuda.register()


def test_a_build_that_leaves_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    for kind in ("nvcc", "runtime"):
        monkeypatch.setitem(_library.build_info, "cuda_kernels", kind)
        _library.check_cuda_built("silu", on_gpu)  # type: ignore[arg-type]
    monkeypatch.setitem(_library.build_info, "cuda_kernels", "none")
    with pytest.raises(RuntimeError, match=r"ops.silu: .*no CUDA kernels.*ACCELRT_RUNTIME_CUDA=0"):
        _library.check_cuda_built("silu", on_gpu)  # type: ignore[arg-type]


def test_this_build() -> None:
    kind = _C.build_info()["cuda_kernels"]
    assert kind in ("nvcc", "runtime", "none")
    assert _C.build_info()["cuda"] is (kind == "nvcc")
    assert {folder for folder, _, _ in _C.kernel_names()} == (
        set(FOLDERS) if kind == "runtime" else set()
    )
