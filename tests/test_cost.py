"""What operators cost: rates of the machine, kept in a file; weights from memory or the cache."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch

import accelrt
from accelrt.config import Config
from accelrt.planning import cost, search


@pytest.fixture(autouse=True)
def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that do not depend on the machine."""
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cost, "profile", lambda device, dtype: cost.Machine())


def test_machine_rates_are_measured_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "rates"))
    device = torch.device("cpu")
    first = cost.machine(device, torch.float32)
    assert first.device_type == "cpu"
    for value in vars(first).values():
        if isinstance(value, str):
            continue
        rates = [rate for _, rate in value] if isinstance(value, tuple) else [value]
        assert min(rates) > 0
        assert rates == sorted(rates)
    monkeypatch.setattr(cost, "profile", lambda *_: pytest.fail("measured twice"))
    assert cost.machine(device, torch.float32) == first
    monkeypatch.setattr(cost, "_known", {})
    assert cost.machine(device, torch.float32) == first  # from the file
    monkeypatch.setattr(cost, "_known", {})
    cost.cache_file().write_text("nonsense")
    monkeypatch.setattr(cost, "profile", lambda *_: cost.Machine())
    assert cost.machine(device, torch.float32) == cost.Machine()


def test_rates_of_another_version_are_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    cost.machine(device, torch.float32)
    kept = json.loads(cost.cache_file().read_text())
    (key,) = kept
    for wrong in (
        {"product_rate": 2e11}, {**kept[key], "product_rates": 2e11}, [],
        {**kept[key], "bandwidth": 0.0}, {**kept[key], "device_type": "disk"},
        {**kept[key], "overhead": "fast"},
    ):  # fmt: skip
        cost.cache_file().write_text(json.dumps({key: wrong}))
        monkeypatch.setattr(cost, "_known", {})
        assert cost.machine(device, torch.float32) == cost.Machine()
    old = {key.replace(f"v{cost.VERSION} ", "v1 "): {"overhead": 1.0}}
    cost.cache_file().write_text(json.dumps(old))
    monkeypatch.setattr(cost, "_known", {})
    assert cost.machine(device, torch.float32) == cost.Machine()
    assert set(json.loads(cost.cache_file().read_text())) == {key, *old}


def test_rates_between_rows() -> None:
    rates = ((4, 1e9), (16, 4e9), (64, 4e9))
    assert cost.rate_at(rates, 4) == cost.rate_at(rates, 2) * 2 == 1e9  # as long as four
    assert cost.rate_at(rates, 8) == pytest.approx(2e9)
    assert cost.rate_at(rates, 16) == cost.rate_at(rates, 1000) == 4e9


def test_short_products_are_slower_per_row() -> None:
    weight = torch.empty(64, 64, device="meta")
    bias, rates = torch.empty(64, device="meta"), cost.Machine()
    seconds = []
    for rows in (16, 256):
        x = torch.empty(rows, 64, device="meta")
        linear = cost.seconds_of("linear", (x, weight), x, rates)
        assert linear == cost.seconds_of("addmm", (bias, x, weight.t()), x, rates)
        seconds.append((linear - rates.product_overhead) / rows)
    assert seconds[0] > 1.3 * seconds[1]


def test_weights_come_from_memory_unless_few_others_passed_since() -> None:
    first, second, large = (torch.empty(n, 8, device="meta") for n in (4, 4, 12))
    size = first.numel() * 4
    rates = dataclasses.replace(cost.Machine(), weight_bandwidth=size, cache_bytes=2 * size)
    read = cost.Weights()
    assert read.seconds([first], rates) == 1.0
    assert read.seconds([first], rates) == 0.0
    assert read.seconds([second, first], rates) == 1.0
    assert read.seconds([large, first], rates) == 3.0 + 1.0
    # Slices that read both in turn: they stay together, three times the cache does not.
    assert cost.Weights().seconds([first, second], rates, times=5) == 2.0
    assert cost.Weights().seconds([large, first], rates, times=5) == 5 * 4.0


def test_a_second_pass_reads_all_weights_again() -> None:
    """What guidance halves in turn cost beside shorter products, and slices in a group do not."""
    free = float("inf")
    rates = dataclasses.replace(
        cost.Machine(), overhead=0.0, product_overhead=0.0, view_overhead=0.0,
        product_rates=((1, free),), attention_rates=((1, free),), bandwidth=free,
        norm_bandwidth=free, kernel_bandwidth=free, convolution_rate=free, weight_bandwidth=1.0,
        cache_bytes=0,
    )  # fmt: skip
    model: Any = zoo.tiny_dit().to("meta")
    steps = torch.empty(2, dtype=torch.long, device="meta")
    x = torch.empty(2, 4, 8, 8, device="meta")
    forward = accelrt.wrap(model).forward
    inputs = forward.arguments(hidden_states=x, timestep=steps, class_labels=steps)
    planned = search.Model(forward, inputs, Config(), rates, 8.0)
    seconds = [planned.run(search.Setting(n, False), planned.fastest).seconds for n in (None, 1)]
    weights = [w for n, w in model.named_parameters() if w.dim() == 2 and "embedding" not in n]
    assert seconds[1] == pytest.approx(2 * seconds[0])
    assert seconds[0] >= sum(w.numel() * w.element_size() for w in weights) > 0


def test_which_operators_read_a_weight() -> None:
    x, bias = torch.empty(2, 8, device="meta"), torch.empty(4, device="meta")
    weight = torch.empty(4, 8, device="meta")
    kernel, image = (torch.empty(shape, device="meta") for shape in ((4, 8, 3, 3), (1, 8, 5, 5)))
    for name, arguments, expected in (
        ("linear", (x, weight, bias), weight),
        ("addmm", (bias, x, weight.t()), weight),
        ("conv2d", (image, kernel), kernel),
        ("mul", (x, x), None),
        ("bmm", (x[None], weight.t()[None]), None),  # of activations, as attention is
    ):
        found = cost.weights_of(name, arguments)
        if expected is None:
            assert found == []
        else:
            (one,) = found
            assert one.untyped_storage()._cdata == expected.untyped_storage()._cdata


def test_the_cache_is_half_of_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_CACHES", tmp_path)
    device = torch.device("cpu")
    assert cost._cache_bytes(device) == cost.Machine.cache_bytes  # not known
    for index, size in enumerate(("48K", "1024K", "32768K", "what")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(size + "\n")
    assert cost._cache_bytes(device) == 16 * 2**20
