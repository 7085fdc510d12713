"""Physical batches: from the free memory, halved where it runs out, never changing the result."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_cases import DIVISOR, KEY, make_data, make_plan

import client.layers
import client.memory
from client.memory import free_bytes, is_out_of_memory, physical_records, record_bytes
from client.noise import ChaChaRandom
from client.training import LocalTrainer
from shared.errors import ConfigError
from shared.models import build_model, initial_parameters

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]


class Limited(nn.Module):
    """A logistic regression in whose forward pass memory ends at some records."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 1)
        self.most, self.error, self.sizes = most, error, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error
        logits: Tensor = self.linear(x)
        return logits.squeeze(1)


def trainer_with(most: int, error: Exception, engine: str = "auto") -> tuple[LocalTrainer, Limited]:
    plan, module = make_plan(), Limited(2, error)
    data = make_data(plan, records_each=[1, 2, 1, 1, 2, 1, 1, 1, 1, 1])
    trainer = LocalTrainer(
        plan, "site-0", data, 0.0, "cpu",
        max_physical_records=16, engine=engine, build=lambda _: module, measuring=True,  # type: ignore[arg-type]
    )  # fmt: skip
    module.most = most
    return trainer, module


@pytest.mark.parametrize("engine", ["auto", "hooks"])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "python", "cpu"])
def test_running_out_of_memory_changes_nothing_but_the_batches(
    error: Exception, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    start = np.linspace(-1, 1, 6).astype(np.float32)
    plenty, _ = trainer_with(100, error, engine)
    want = plenty.gradient(start, np.arange(10), ChaChaRandom(KEY)) * DIVISOR
    assert np.linalg.norm(want) > 0.1
    with caplog.at_level(logging.WARNING, logger="fedward.client"):
        tight, module = trainer_with(5, error, engine)
        module.sizes.clear()
        got = tight.gradient(start, np.arange(10), ChaChaRandom(KEY)) * DIVISOR
    assert module.sizes == [12, 7, 4, 4, 4]  # 16 and 8 do not fit; then 4 at a time
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert "physical batches of 4 records" in caplog.text


def test_memory_that_ends_while_layers_are_added_adds_nobody_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = make_plan("mlp", privacy={"clip_norm": 0.1})
    data, start, calls = make_data(plan, 12), initial_parameters(plan), 0

    def sums() -> np.ndarray:
        trainer = LocalTrainer(
            plan, "site-0", data, 0.0, "cpu", max_physical_records=6, measuring=True
        )
        return trainer.gradient(start, np.arange(12), ChaChaRandom(KEY))

    want = sums()
    real = client.layers.LinearRule.add_weighted

    def once(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 * 2 + 2:  # the second layer of the second physical batch, after the check
            raise MemoryError
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(client.layers.LinearRule, "add_weighted", once)
    np.testing.assert_allclose(sums(), want, atol=1e-7)
    assert calls > 6


def test_a_patient_who_does_not_fit_is_an_error_and_other_errors_pass() -> None:
    trainer, _ = trainer_with(0, MemoryError())
    start, random = np.ones(6, dtype=np.float32), ChaChaRandom(KEY)
    with pytest.raises(ConfigError, match="a single patient's records do not fit"):
        trainer.gradient(start, np.arange(10), random)
    other, _ = trainer_with(0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        other.gradient(start, np.arange(10), random)
    assert not is_out_of_memory(RuntimeError("something else"))


def test_the_physical_batch_follows_the_free_memory() -> None:
    module = build_model(make_plan("cnn", image=64))
    example = torch.zeros(1, 1, 64, 64)
    each = record_bytes(module, example, holds_gradients=False)
    assert 4 * 4 * 64 * 64 < each < 10 << 20

    def records(free: int | None) -> int:
        return physical_records(module, example, holds_gradients=False, free=free)

    assert records(None) == 128
    assert records(4 * 20 * each) == 16  # a power of two
    assert records(0) == 1
    assert record_bytes(module, example, holds_gradients=True) > each


def test_free_memory_is_the_machines_or_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    monkeypatch.setattr(client.memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(client.memory, "_GROUP", tmp_path)
    cpu = torch.device("cpu")
    assert free_bytes(cpu) == 2 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert free_bytes(cpu) == 2 << 20
    (tmp_path / "memory.max").write_text("1100\n")
    assert free_bytes(cpu) == 1000
    (tmp_path / "meminfo").unlink()
    (tmp_path / "memory.max").unlink()
    assert free_bytes(cpu) is None
