"""Forms of one model in turn: seconds, ratios, utilisation, page faults."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from accelrt.benchmarking.flops import matrix_product, product_size, utilisation
from accelrt.benchmarking.process import ProcessWatch
from accelrt.benchmarking.results import Rates, Times
from accelrt.benchmarking.timing import Thunk, calls_per_round, interleave, ratio

PRODUCT_SECONDS = {"full": 0.5, "tiny": 0.02}  # of matrix products before each forward
FORM_SECONDS = 0.2  # a round of a model whose forward is shorter
LONG_SECONDS = 1.0  # from here on, one forward is enough for a round


def time_forms(
    forms: Mapping[str, Thunk],
    seconds: Mapping[str, float],
    flops: int,
    *,
    first: str,
    dtype: torch.dtype,
    device: str,
    size: str,
    rounds: int,
    on_call: Callable[[str, int], None] | None = None,
) -> Rates:
    """Time the forms in turn, each after matrix products of its own.

    Args:
        forms: by name.
        seconds: roughly what a call of each takes. A form that takes longer than
            ``LONG_SECONDS`` is called once a round and gets no uncounted call here.
        flops: of one stock forward, for the utilisation of all of them.
        first: the form that the ``speedup`` of the others is over.
        dtype: of the matrices.
        device: ``"cpu"`` or ``"cuda"``.
        size: ``"full"`` or ``"tiny"``, for the size of the matrices.
        rounds: at least 1, unless there are no forms.
        on_call: called as ``on_call(name, round)`` before each form.

    Returns:
        The times in the order of the forms. The product's rate is that of its median time;
        utilisation is taken against the product of the same round.
    """
    rows = product_size(device, size)
    product, product_flops = matrix_product(rows, dtype, device)
    watches: dict[str, list[ProcessWatch]] = {name: [] for name in forms}

    def watched(name: str, form: Thunk) -> Thunk:
        if device == "cuda":  # reading the system's files would delay the launches
            return form

        def call() -> None:
            with ProcessWatch() as watch:
                form()
            watches[name].append(watch)

        return call

    def heard(name: str, index: int) -> None:
        if on_call is not None and name in forms:
            on_call(name, index)

    calls = {name: 1 for name in forms if seconds[name] > LONG_SECONDS}
    products_per_round = calls_per_round([product], device, PRODUCT_SECONDS[size])
    thunks: dict[str, list[Thunk]] = {}
    for name, form in forms.items():
        before = f"product before {name}"
        thunks[before], calls[before] = [product], products_per_round
        thunks[name] = [watched(name, form)]
    timings = interleave(
        thunks,
        device=device,
        rounds=rounds,
        slice_seconds=FORM_SECONDS,
        calls=calls,
        on_call=heard,
    )
    times = []
    products: list[float] = []
    for name in forms:
        own, beside = timings[name].rounds, timings[f"product before {name}"].rounds
        products += beside
        growth = [watch.growth for watch in watches[name] if watch.growth is not None]
        faults = [watch.page_faults for watch in watches[name]]
        times.append(
            Times(
                run=name,
                seconds=own,
                speedup=ratio(timings[first], timings[name]),
                utilisation=statistics.median(
                    utilisation(flops, a, product_flops, b)
                    for a, b in zip(own, beside, strict=True)
                ),
                page_faults=int(statistics.median(faults)) if faults else None,
                process_peak_bytes=int(statistics.median(growth)) if growth else None,
            )
        )
    if not products:
        alone = {"product": [product]}
        timed = interleave(alone, device=device, rounds=3, calls={"product": products_per_round})
        products += timed["product"].rounds
    return Rates(rows, product_flops / statistics.median(products), tuple(times))
