"""Random flips and shifts of images, several of each record in one step.

A record's gradient is averaged over its variants before clipping, so the guarantee is that of one
record (De et al., "Unlocking High-Accuracy Differentially Private Image Classification through
Scale", 2022, section 3.2). A variant follows from the step's key and the record's own bytes
alone: drawn in the order of the batch, it would depend on who else is in it.
"""

from __future__ import annotations

import hashlib
import hmac

import torch
from torch import Tensor
from torch.nn import functional

from shared.plan import AugmentPlan


def variants(records: Tensor, plan: AugmentPlan, key: bytes) -> Tensor:
    """Each record's variants, one after another.

    Args:
        records: float32, shape (records, channels, [depth,] height, width), on the CPU.
        plan: How many, and which.
        key: The step's own, 32 bytes.

    Returns:
        Shape (records * plan.variants, ...).
    """
    made = [
        _variant(record, plan, hmac.digest(key, digest + bytes([i]), "sha256"))
        for record in records
        for digest in [hashlib.sha256(record.numpy().tobytes()).digest()]
        for i in range(plan.variants)
    ]
    return torch.stack(made) if made else records


def _variant(record: Tensor, plan: AugmentPlan, random: bytes) -> Tensor:
    if plan.flip and random[0] & 1:
        record = record.flip(-1)
    if plan.shift_pixels:
        most = plan.shift_pixels
        down, right = (_below(2 * most + 1, random[8 * i : 8 * i + 8]) for i in (1, 2))
        height, width = record.shape[-2:]
        flat = record.reshape(1, -1, height, width)
        padded = functional.pad(flat, (most, most, most, most), mode="replicate")
        record = padded[..., down : down + height, right : right + width].reshape(record.shape)
    return record


def _below(limit: int, random: bytes) -> int:
    """A number below `limit` from 8 uniform bytes; the bias is below 2^-56."""
    return int.from_bytes(random, "little") % limit
