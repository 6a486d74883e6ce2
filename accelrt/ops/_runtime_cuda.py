"""The CUDA kernels of a build without nvcc: compiled by NVRTC and launched through CuPy.

The C++ launchers are those of every build. Where nvcc has not compiled their kernels they hand
name, grid and parameters to :func:`launch`, which compiles the kernel's source (shipped with
the package) the first time a GPU asks for it, keeps the code on disk, and launches it on torch's
current stream. From then on CuPy takes its memory from torch's pool.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from accelrt import _C

from ._compile import (
    Compiled,
    KernelCache,
    cache_folder,
    compile_kernels,
    source_folder,
    sources_digest,
    target_for,
    version_of,
)

# More dynamic shared memory than this must be asked for, kernel by kernel.
_DEFAULT_SHARED_BYTES = 48 * 1024


def register() -> None:
    """Have the CUDA launchers call what is here, unless nvcc has compiled their kernels."""
    if _C.build_info()["cuda_kernels"] == "runtime":
        _C.set_kernel_launcher(launch, attribute)


def launch(
    op: str,
    folder: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    stream: int,
    params: int,
    params_bytes: int,
) -> None:
    """Run a kernel on the current device.

    Its first launch there loads it, which a stream that is being captured may refuse: run once
    before a CUDA graph is captured, as one does for torch's own kernels.

    Args:
        op: the operator, for messages.
        folder: of the headers that define the kernel, e.g. ``"kernels/geglu"``.
        kernel: its name with template arguments, as an expression of namespace ``accelrt``.
        grid: blocks along x, y and z.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        stream: a ``cudaStream_t``.
        params: address of the kernel's only argument, which the driver copies.
        params_bytes: its size.

    Raises:
        RuntimeError: there is no CuPy or no NVRTC (with the command that installs it), or the
            kernel does not compile.
    """
    _session().launch(folder, kernel, grid, threads, shared_bytes, stream, params)


def attribute(number: int) -> int:
    """An attribute of the current device (``cudaDeviceAttr``), by which launchers choose.

    Raises:
        RuntimeError: as :func:`launch`.
    """
    return _session().attribute(number)


class RuntimeKernels:
    """The kernels that this process has loaded.

    Args:
        cupy: the package.

    Raises:
        RuntimeError: CuPy has no NVRTC.
    """

    def __init__(self, cupy: ModuleType) -> None:
        self._cupy = cupy
        self._driver: Any = cupy.cuda.driver
        self._nvrtc: Any = cupy.cuda.nvrtc
        try:
            compiler = version_of(self._nvrtc)
        except Exception as error:
            raise RuntimeError(
                f"CuPy finds no NVRTC ({error}): `pip install {_packages()[1]}`"
            ) from error
        self._root = source_folder()
        self._cache = KernelCache(cache_folder(), sources_digest(self._root), compiler)
        self._lock = threading.Lock()
        self._attributes: dict[tuple[int, int], int] = {}
        self._functions: dict[tuple[int, str], int] = {}
        self._shared: dict[int, int] = {}  # what a function may use, where it is above the default

    def launch(
        self,
        folder: str,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        params: int,
    ) -> None:
        """See :func:`launch`."""
        device = torch.cuda.current_device()
        driver = self._driver
        if not driver.ctxGetCurrent():
            # In a thread whose first call this is; torch's own calls are the runtime's, which
            # makes the context current by itself.
            self._cupy.cuda.runtime.setDevice(device)
        function = self._functions.get((device, kernel))
        if function is None:
            function = self._load(device, folder, kernel)
        if shared_bytes > self._shared.get(function, _DEFAULT_SHARED_BYTES):
            attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(function, attribute, shared_bytes)
            self._shared[function] = shared_bytes
        arguments = (ctypes.c_void_p * 1)(params)
        address = ctypes.addressof(arguments)
        driver.launchKernel(function, *grid, threads, 1, 1, shared_bytes, stream, address, 0)

    def attribute(self, number: int) -> int:
        """See :func:`attribute`."""
        key = torch.cuda.current_device(), number
        value = self._attributes.get(key)
        if value is None:
            value = int(self._cupy.cuda.runtime.deviceGetAttribute(number, key[0]))
            self._attributes[key] = value
        return value

    def _load(self, device: int, folder: str, kernel: str) -> int:
        with self._lock:
            function = self._functions.get((device, kernel))
            if function is None:
                compiled = self._compiled(device, folder, kernel)
                # A module lives as long as the process: CUDA graphs may hold its functions.
                module = self._driver.moduleLoadData(compiled.image)
                function = int(self._driver.moduleGetFunction(module, compiled.function))
                self._functions[device, kernel] = function
        return function

    def _compiled(self, device: int, folder: str, kernel: str) -> Compiled:
        target = target_for(self._nvrtc, torch.cuda.get_device_capability(device))
        path = self._cache.path(folder, kernel, target)
        compiled = self._cache.load(path)
        if compiled is None:
            image, names = compile_kernels(self._nvrtc, self._root, folder, [kernel], target)
            compiled = Compiled(names[kernel], image)
            self._cache.store(path, compiled)
        return compiled


def share_memory_pool(cupy: ModuleType) -> bool:
    """Let CuPy allocate from torch's pool, on CuPy's current stream.

    Two pools would each hold on to memory that the other lacks. An allocator that the program
    has given CuPy stays.

    Returns:
        whether CuPy's allocator is now torch's.
    """
    if cupy.cuda.get_allocator() != cupy.get_default_memory_pool().malloc:
        return False

    def allocate(size: int, device: int) -> int:
        stream = cupy.cuda.get_current_stream().ptr
        return int(torch.cuda.caching_allocator_alloc(size, device, stream))

    release: Callable[[int], None] = torch.cuda.caching_allocator_delete

    def free(address: int, device: int) -> None:
        release(address)

    cupy.cuda.set_allocator(cupy.cuda.PythonFunctionAllocator(allocate, free).malloc)
    return True


_active: RuntimeKernels | None = None
_activation = threading.Lock()


def _session() -> RuntimeKernels:
    global _active
    if _active is None:
        with _activation:
            if _active is None:
                cupy = _import_cupy()
                session = RuntimeKernels(cupy)
                share_memory_pool(cupy)
                _active = session
    return _active


def _import_cupy() -> ModuleType:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError(
            "the CUDA kernels of this build are compiled at first use, through CuPy, which does "
            f"not import ({error}): `pip install {' '.join(_packages())}`, or build accelrt with "
            "nvcc on the PATH"
        ) from error


def _packages() -> tuple[str, str]:
    """CuPy and NVRTC of the CUDA that torch has; the extra ``cuda`` installs those of CUDA 13."""
    if str(torch.version.cuda or "").startswith("12."):
        return "cupy-cuda12x", "nvidia-cuda-nvrtc-cu12"
    return "cupy-cuda13x", "nvidia-cuda-nvrtc"
