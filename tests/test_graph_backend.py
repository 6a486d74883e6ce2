"""The CUDA backend of graphs against a ``torch.cuda`` that writes down what it is asked.

It has not run on a GPU: this is about the order of its calls, and the state that it leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from accelrt.steps.graph_backend import CudaBackend

DEVICE = torch.device("cuda", 0)


class FakeCuda:
    """Streams by name, and a log."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = Stream(self, "main")
        self.refuses_end = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "Stream", lambda device: Stream(self, "side"))
        monkeypatch.setattr(cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(cuda, "set_stream", self.set_stream)
        monkeypatch.setattr(cuda, "stream", self.stream)
        monkeypatch.setattr(cuda, "graph", self.graph)
        monkeypatch.setattr(cuda, "device", self.device)

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        assert device == DEVICE
        yield

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph(self, graph: Any, *, pool: Any, stream: Stream, capture_error_mode: str) -> Any:
        return Capture(self, stream, f"{pool} {capture_error_mode}")


class Capture:
    """As :class:`torch.cuda.graph`: an error at the end leaves the stream as it is."""

    def __init__(self, cuda: FakeCuda, stream: Stream, settings: str) -> None:
        self.cuda, self.stream, self.settings = cuda, stream, settings

    def __enter__(self) -> None:
        self.before = self.cuda.current
        self.cuda.current = self.stream
        self.cuda.log.append(f"begin on {self.stream.name}, {self.settings}")

    def __exit__(self, *_: object) -> None:
        self.cuda.log.append("end")
        if self.cuda.refuses_end:
            raise RuntimeError("capture invalidated")
        self.cuda.current = self.before


class Stream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name, self.cuda_stream = cuda, name, len(name)

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.cuda.log.append(f"{self.name} waits for what {event.where} did")


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.where = cuda, ""

    def record(self, stream: Stream) -> None:
        self.where = stream.name
        self.cuda.log.append(f"recorded on {stream.name}")


class Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def replay(self) -> None:
        self.cuda.log.append(f"replay on {self.cuda.current.name}")

    def reset(self) -> None:
        self.cuda.log.append("reset")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def test_a_warm_up_is_between_what_came_before_and_what_comes_after(cuda: FakeCuda) -> None:
    backend = CudaBackend()
    with backend.warm_up(DEVICE):
        cuda.log.append(f"run on {cuda.current.name}")
    assert cuda.log == ["side waits for main", "run on side", "main waits for side"]
    with pytest.raises(KeyError), backend.warm_up(DEVICE):
        raise KeyError
    assert cuda.log[-1] == "main waits for side"
    assert cuda.current.name == "main"


def test_a_capture_is_on_the_stream_of_the_warm_up(cuda: FakeCuda) -> None:
    backend = CudaBackend()
    with backend.warm_up(DEVICE):
        side = cuda.current
    with backend.capture("pool", DEVICE) as graph:
        assert cuda.current is side
    assert cuda.current.name == "main"
    backend.replay(graph)
    backend.reset(graph)
    begin = "begin on side, pool thread_local"
    assert cuda.log[-4:] == [begin, "end", "replay on main", "reset"]


@pytest.mark.parametrize("refuses_end", [False, True], ids=["body", "device"])
def test_a_failed_capture_leaves_the_stream_current(cuda: FakeCuda, refuses_end: bool) -> None:
    cuda.refuses_end = refuses_end
    backend = CudaBackend()
    with pytest.raises((ValueError, RuntimeError)), backend.capture("pool", DEVICE):
        raise ValueError("in the body")
    assert cuda.log[-1] == "end"
    assert cuda.current.name == "main"
    assert backend.stream(DEVICE) == len("main")


def test_users_of_static_memory_wait_for_each_other_across_streams(cuda: FakeCuda) -> None:
    backend = CudaBackend()
    for name in ("first", "second"):
        cuda.current = Stream(cuda, name)
        with backend.in_turn(DEVICE):
            cuda.log.append(f"copies and replays on {name}")
    with pytest.raises(KeyError), backend.in_turn(DEVICE):
        raise KeyError
    assert cuda.log == [
        "copies and replays on first",
        "recorded on first",
        "second waits for what first did",
        "copies and replays on second",
        "recorded on second",
        "second waits for what second did",
        "recorded on second",
    ]


def test_the_pool_is_measured_by_its_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 100},
        {"segment_pool_id": (0, 7), "total_size": 20},
        {"segment_pool_id": (0, 7), "total_size": 3},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert CudaBackend().pool_bytes((0, 7), DEVICE) == 23


def test_without_a_gpu_nothing_captures() -> None:
    if not torch.cuda.is_available():
        assert not CudaBackend().is_capturing()
