"""A stand-in for CuPy that records what it is asked for: no GPU, no driver."""

from __future__ import annotations

import ctypes
from types import ModuleType, SimpleNamespace
from typing import Any


class FakeNvrtc:
    """Compiles to the text of what it was asked for."""

    def __init__(self) -> None:
        self.options: list[tuple[str, ...]] = []

    def getVersion(self) -> tuple[int, int]:
        return 13, 0

    def getSupportedArchs(self) -> list[int]:
        return [80, 90]

    def createProgram(self, source: str, name: str, headers: Any, include_names: Any) -> Any:
        return SimpleNamespace(source=source, names=[])

    def addNameExpression(self, program: Any, name: str) -> None:
        program.names.append(name)

    def compileProgram(self, program: Any, options: tuple[str, ...]) -> None:
        self.options.append(options)

    def getCUBIN(self, program: Any) -> bytes:
        return b"cubin\n\0" + "".join(program.names).encode()

    def getLoweredName(self, program: Any, name: str) -> str:
        return f"lowered {name}"

    def destroyProgram(self, program: Any) -> None:
        program.source = None


class FakeDriver:
    """Records; a function is the number of a load."""

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self) -> None:
        self.context = 1
        self.loaded: list[tuple[bytes, str]] = []
        self.attributes: list[tuple[int, int, int]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.params_bytes = 0

    def ctxGetCurrent(self) -> int:
        return self.context

    def moduleLoadData(self, image: bytes) -> bytes:
        return image

    def moduleGetFunction(self, module: bytes, name: str) -> int:
        self.loaded.append((module, name))
        return len(self.loaded)

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:
        self.attributes.append((function, attribute, value))

    def launchKernel(self, *arguments: int) -> None:
        *place, kernel_params, extra = arguments
        assert extra == 0
        (address,) = (ctypes.c_void_p * 1).from_address(kernel_params)
        self.launched.append((*place, ctypes.string_at(address, self.params_bytes)))


class FakeCupy(ModuleType):
    """The parts of CuPy that launch kernels and share memory."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.pool = SimpleNamespace(malloc=lambda size: "CuPy's own")
        self.allocator: Any = self.pool.malloc
        self.devices: list[int] = []
        self.asked: list[tuple[int, int]] = []
        self.cuda = SimpleNamespace(
            driver=FakeDriver(),
            nvrtc=FakeNvrtc(),
            runtime=SimpleNamespace(
                setDevice=self.devices.append, deviceGetAttribute=self.attribute
            ),
            get_allocator=lambda: self.allocator,
            set_allocator=lambda allocator: setattr(self, "allocator", allocator),
            get_current_stream=lambda: SimpleNamespace(ptr=77),
            PythonFunctionAllocator=lambda allocate, free: SimpleNamespace(malloc=(allocate, free)),
        )

    def attribute(self, number: int, device: int) -> int:
        self.asked.append((number, device))
        return 100 * number + device

    def get_default_memory_pool(self) -> Any:
        return self.pool
