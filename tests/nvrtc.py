"""NVRTC, the run-time compiler, with the names and signatures that ``cupy.cuda.nvrtc`` gives it.

A library of the compiler alone: of the wheel ``nvidia-cuda-nvrtc``, or beside nvcc. No GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

OLDEST = 13  # the first that knows all architectures of ours


class NVRTCError(RuntimeError):
    pass


def library_paths() -> Iterable[Path]:
    """Where a libnvrtc may be: the wheel's folder, then the toolkit's."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(folder).glob("**/lib*/libnvrtc.so.*"), reverse=True)
    compiler = shutil.which("nvcc")
    if compiler is not None:
        root = Path(compiler).resolve().parent.parent
        yield from sorted(root.glob("**/lib*/libnvrtc.so.*"), reverse=True)


def load() -> SimpleNamespace | None:
    """The functions, or ``None`` where there is no NVRTC that is new enough."""
    for path in library_paths():
        functions = bind(ctypes.CDLL(str(path)))
        if functions.getVersion()[0] >= OLDEST:
            return functions
    return None


def bind(library: ctypes.CDLL) -> SimpleNamespace:
    error_string = library.nvrtcGetErrorString
    error_string.restype = ctypes.c_char_p

    def call(name: str, *arguments: object) -> None:
        status = getattr(library, name)(*arguments)
        if status != 0:
            raise NVRTCError(f"{name}: {error_string(status).decode()}")

    def bytes_of(name: str) -> Callable[[int], bytes]:
        def get(program: int) -> bytes:
            size = ctypes.c_size_t()
            call(f"nvrtcGet{name}Size", ctypes.c_void_p(program), ctypes.byref(size))
            buffer = ctypes.create_string_buffer(size.value)
            call(f"nvrtcGet{name}", ctypes.c_void_p(program), buffer)
            return buffer.raw

        return get

    def get_version() -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def supported_archs() -> list[int]:
        count = ctypes.c_int()
        call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        call("nvrtcGetSupportedArchs", found)
        return list(found)

    def create(source: str, name: str, headers: tuple[()], include_names: tuple[()]) -> int:
        assert not headers
        assert not include_names
        program = ctypes.c_void_p()
        text = (source.encode(), name.encode())
        call("nvrtcCreateProgram", ctypes.byref(program), *text, 0, None, None)
        assert program.value is not None
        return program.value

    def compile_program(program: int, options: Iterable[str]) -> None:
        encoded = [option.encode() for option in options]
        array = (ctypes.c_char_p * len(encoded))(*encoded)
        call("nvrtcCompileProgram", ctypes.c_void_p(program), len(encoded), array)

    def lowered_name(program: int, name: str) -> str:
        lowered = ctypes.c_char_p()
        expression = name.encode()
        call("nvrtcGetLoweredName", ctypes.c_void_p(program), expression, ctypes.byref(lowered))
        assert lowered.value is not None
        return lowered.value.decode()

    log, ptx = bytes_of("ProgramLog"), bytes_of("PTX")
    return SimpleNamespace(
        NVRTCError=NVRTCError,
        getVersion=get_version,
        getSupportedArchs=supported_archs,
        createProgram=create,
        addNameExpression=lambda program, name: call(
            "nvrtcAddNameExpression", ctypes.c_void_p(program), name.encode()
        ),
        compileProgram=compile_program,
        getLoweredName=lowered_name,
        getProgramLog=lambda program: log(program).rstrip(b"\0").decode(),
        getPTX=lambda program: ptx(program).rstrip(b"\0").decode(),
        getCUBIN=bytes_of("CUBIN"),
        destroyProgram=lambda program: call(
            "nvrtcDestroyProgram", ctypes.byref(ctypes.c_void_p(program))
        ),
    )
