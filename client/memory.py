"""How many records a physical batch may hold, from the memory that is free.

A step that runs out of memory all the same is taken again in smaller physical batches
(client/training.py), so what is estimated here costs time at worst, never a result.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

MOST_RECORDS = 512
SHARE = 0.25
"""Of the free memory, for one physical batch: other sites may share the machine."""

CACHE_VALUES = 1 << 19
"""Input values of a physical batch that a CPU likes best: 128 images of 64 x 64."""

_MEMORY = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def physical_records(
    module: nn.Module, example: Tensor, *, holds_gradients: bool, free: int | None
) -> int:
    """Records of a physical batch, 1 to 512.

    It is rounded down to a power of two, so that two runs on one machine have the same.

    Args:
        module: The model, on its device.
        example: One record, shape (1, *shape), on the same device.
        holds_gradients: Whether every patient's gradient of every parameter is held.
        free: Bytes that are free; None where nobody knows.
    """
    values = example.numel()
    likes = max(16, CACHE_VALUES // values) if example.device.type == "cpu" else MOST_RECORDS
    most = min(likes, MOST_RECORDS)
    if free is not None:
        fitting = int(SHARE * free) // record_bytes(module, example, holds_gradients)
        most = min(most, fitting)
    return 1 << int(math.log2(max(1, most)))


def record_bytes(module: nn.Module, example: Tensor, holds_gradients: bool) -> int:
    """About what one more record of a physical batch takes, in float32."""
    seen = [example.numel()]

    def note(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        del layer, inputs
        parts = output if isinstance(output, tuple) else (output,)
        seen.append(sum(part.numel() for part in parts if isinstance(part, Tensor)))

    leaves = [part for part in module.modules() if not list(part.children())]
    handles = [part.register_forward_hook(note) for part in leaves]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    # Outputs, what is kept for the backward pass, and their gradients; Opacus holds a record's
    # gradient twice for a moment.
    held = (
        2 * sum(p.numel() for p in module.parameters() if p.requires_grad) if holds_gradients else 0
    )
    return 4 * (4 * sum(seen) + held)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new tensor could take, or None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    known = [n for n in (_available(), _left_in_group()) if n is not None]
    return min(known, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in this process."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _available() -> int | None:
    try:
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _left_in_group() -> int | None:
    """A container's limit less what it uses."""
    try:
        limit = (_GROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (_GROUP / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdigit() else None
