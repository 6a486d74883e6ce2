"""What CUDA graphs are asked of a device: warm-up, capture, replay, and a pool of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch


class GraphBackend(Protocol):
    """Captures what a thread launches, and launches it again.

    A capture records kernels with the addresses that they were given and does not run them;
    what it allocates comes from a pool, whose memory the graphs of that pool share, since
    only one of them runs at a time. It may not wait for the device, nor copy from memory that
    is not pinned.

    Attributes:
        device_type: of the tensors that it takes.
    """

    device_type: str

    def pool(self, device: torch.device) -> Any:
        """A new pool, without memory."""

    def pool_bytes(self, pool: Any, device: torch.device) -> int:
        """What a pool holds on its device."""

    def warm_up(self, device: torch.device) -> AbstractContextManager[None]:
        """Run what follows on the stream that captures, in its turn among what runs."""

    def capture(self, pool: Any, device: torch.device) -> AbstractContextManager[Any]:
        """Capture what follows into a graph, which is what the context gives.

        Whatever is raised inside, also by the device, the stream is current again that was
        so before, and is not capturing.
        """

    def replay(self, graph: Any) -> None:
        """Launch a graph on the current stream."""

    def reset(self, graph: Any) -> None:
        """Let go of a graph and of its claim on the pool."""

    def in_turn(self, device: torch.device) -> AbstractContextManager[None]:
        """What follows uses static memory: on any stream, after what used it before."""

    def is_capturing(self) -> bool:
        """Somebody captures the current stream: nothing may be captured inside."""

    def stream(self, device: torch.device) -> int:
        """Tells the current stream of a device apart from others."""


class CudaBackend:
    """:class:`torch.cuda.CUDAGraph`.

    All captures of a device use one stream, which their pool requires; the calls before a
    capture run there too, so that what libraries keep by stream (cuBLAS its workspace)
    exists before.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: dict[torch.device, torch.cuda.Event] = {}

    def pool(self, device: torch.device) -> Any:
        """A handle: the memory comes with the first capture."""
        return torch.cuda.graph_pool_handle()

    def pool_bytes(self, pool: Any, device: torch.device) -> int:
        """Segments that the allocator holds for the pool."""
        segments: Any = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        own = (s for s in segments if tuple(s["segment_pool_id"]) == tuple(pool))
        return sum(int(segment["total_size"]) for segment in own)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]

    @contextmanager
    def warm_up(self, device: torch.device) -> Iterator[None]:
        """On the capturing stream; what is allocated there must not leave the context."""
        side, current = self._stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            current.wait_stream(side)

    @contextmanager
    def capture(self, pool: Any, device: torch.device) -> Iterator[Any]:
        """With errors of this thread only: others may allocate meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            current = torch.cuda.current_stream(device)
            try:
                with torch.cuda.graph(
                    graph,
                    pool=pool,
                    stream=self._stream(device),
                    capture_error_mode="thread_local",
                ):
                    yield graph
            finally:
                # Ending a capture that the device refused leaves the other stream current.
                torch.cuda.set_stream(current)

    def replay(self, graph: Any) -> None:
        """On the current stream."""
        graph.replay()

    def reset(self, graph: Any) -> None:
        """Frees the executable graph."""
        graph.reset()

    @contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        """An event orders the calls of different streams."""
        current = torch.cuda.current_stream(device)
        last = self._last.get(device)
        if last is None:
            last = self._last[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        else:
            current.wait_event(last)
        try:
            yield
        finally:
            last.record(current)

    def is_capturing(self) -> bool:
        """Only where CUDA was used at all."""
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def stream(self, device: torch.device) -> int:
        """Its handle."""
        return int(torch.cuda.current_stream(device).cuda_stream)
