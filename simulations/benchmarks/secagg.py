"""The secure sum's vector work against Flower's SecAgg+ functions and TenSEAL CKKS.

    python -m simulations.benchmarks.secagg [--quick] [--parameters D] [--sites N ...] [--json FILE]

Client: from a real vector to the bytes that are sent (weight, clip, quantise, masks, and in ours
the Merkle root and the signature). Server: from all sites' bytes to the real sum, no dropouts.
Times are CPU seconds of all threads, the best of interleaved repetitions; Flower's and TenSEAL's
sizes are theirs as sent. `degree` is the number of sites that one masks against: all others, or as
many as the cohort's threshold and colluders need. TenSEAL is optional (`pip install tenseal`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from shared.secagg import merkle
from shared.secagg.encoding import digest
from shared.secagg.graph import least_threshold, mask_degree
from shared.secagg.masking import VectorSource, add_masks, masked_wire
from shared.secagg.prg import CHUNK, Prg
from shared.secagg.ring import Quantised, RealVector, Ring
from simulations.benchmarks.report import Row, best_of, parser, publish

COHORTS = {4: ((3, 1),), 10: ((8, 2),), 32: ((28, 3),), 100: ((90, 10), (95, 6))}
"""Sites -> (threshold, colluders) of cohorts of that size."""

BITS = 24
CLIP = 8.0
LAYERS = 24
FLOWER_TARGET, FLOWER_MODULUS = 1 << 22, 1 << 32  # defaults of SecAggPlusWorkflow


@dataclass(frozen=True)
class Sides:
    """One system at one size: what its client and its server do, and the client's bytes.

    `opened` is what is left to do until the sum is in clear, where the server cannot do it.
    """

    client: Callable[[], object]
    server: Callable[[], object]
    size_bytes: int
    opened: Callable[[], object] = lambda: None


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the JSON file."""
    options = parser("secure sum against Flower's SecAgg+ functions and TenSEAL CKKS")
    options.add_argument("--parameters", type=int, help="length of the vector (default 11 million)")
    options.add_argument("--sites", type=int, nargs="+", help="cohorts (default 4 10 32 100)")
    options.add_argument(
        "--prg", choices=get_args(Prg), default="chacha20", help="our masks (default chacha20)"
    )
    options.add_argument(
        "--bits", type=int, choices=(16, 24, 32), default=BITS, help="our ring (default 24)"
    )
    chosen = options.parse_args(arguments)
    parameters = chosen.parameters or (200_000 if chosen.quick else 11_000_000)
    cohorts = chosen.sites or ([4, 10] if chosen.quick else list(COHORTS))
    values = np.random.default_rng(0).normal(0, 0.05, parameters).astype(np.float32)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for sites in cohorts:
        against_flower(values, sites, chosen, rows, ratios)
    against_tenseal(values, cohorts[0], chosen, rows, ratios)
    rings(values, cohorts[0], chosen, rows, ratios)
    inner_loop(values, chosen, rows, ratios)
    threads(values, chosen, rows, ratios)
    publish(rows, ratios, chosen.json)


def degrees_for(sites: int) -> list[int]:
    """The complete graph's degree, then those that cohorts of this size need, where smaller."""
    colluders = max(1, sites // 10)
    threshold = max(least_threshold(sites, colluders), sites - sites // 10)
    cohorts = COHORTS.get(sites, ((threshold, colluders),))
    needed = {mask_degree(sites, *cohort) for cohort in cohorts}
    return sorted({sites - 1, *needed}, reverse=True)


def fedward(
    values: RealVector, sites: int, degree: int, bits: int = BITS, prg: Prg = "chacha20"
) -> Sides:
    """Ours; the sum of all sites is checked once against the true one."""
    ring = Ring(bits, sites)
    keys = [os.urandom(32) for _ in range(degree + 1)]
    self_keys = [os.urandom(32) for _ in range(sites)]
    identity = Ed25519PrivateKey.generate()
    below = degree // 2

    def client() -> bytes:
        source = Quantised(values, ring, clip_range=CLIP, key=os.urandom(32), weight=0.5)
        wire = masked_wire(source, keys[below:], keys[:below], bits, prg=prg)
        root = merkle.root(wire, CHUNK * bits // 8)
        identity.sign(digest("masked", root))
        return wire

    unmasked = ring.quantise(values, clip_range=CLIP, key=bytes(32), weight=0.5)
    wires = masked_wire(VectorSource(unmasked), [self_keys[0]], [], bits, prg=prg)

    def server(own_keys: list[bytes] = self_keys) -> RealVector:
        total = ring.zeros(len(values))
        for _ in range(sites):
            ring.add_wire(total, wires)
        add_masks(total, [], own_keys, bits, prg=prg)
        return ring.dequantise(total.astype(np.uint32, copy=False), clip_range=CLIP)

    # Every site sends the same bytes here, so the same key opens each.
    error = np.abs(server([self_keys[0]] * sites) - sites * 0.5 * values).max()
    assert error <= 1.001 * sites * CLIP / ring.limit + 1e-5, "our sum is wrong"
    return Sides(client, server, len(wires))


def flower(values: RealVector, sites: int, degree: int) -> Sides:
    """Flower's functions, called as its secaggplus_mod and SecAggPlusWorkflow call them."""
    from flwr.common import bytes_to_ndarray, ndarray_to_bytes  # noqa: PLC0415
    from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic  # noqa: PLC0415
    from flwr.common.secure_aggregation.quantization import dequantize, quantize  # noqa: PLC0415
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen  # noqa: PLC0415

    layers = np.array_split(values, LAYERS)
    seeds = [os.urandom(32) for _ in range(degree + 1)]
    ratio = FLOWER_TARGET // 2
    steps = [arithmetic.parameters_addition, arithmetic.parameters_subtraction]

    def client() -> list[bytes]:
        weighted = arithmetic.parameters_multiply(layers, ratio / FLOWER_TARGET)
        masked: list[Any] = quantize(weighted, CLIP, FLOWER_TARGET)
        masked = arithmetic.factor_combine(ratio, masked)
        shapes = [array.shape for array in masked]
        for number, seed in enumerate(seeds):
            mask = pseudo_rand_gen(seed, FLOWER_MODULUS, shapes)
            masked = steps[number % 2](masked, mask)
        masked = arithmetic.parameters_mod(masked, FLOWER_MODULUS)
        return [ndarray_to_bytes(array) for array in masked]

    sent = client()

    def server() -> list[Any]:
        total = [bytes_to_ndarray(part) for part in sent]
        for _ in range(sites - 1):
            vector = [bytes_to_ndarray(part) for part in sent]
            total = arithmetic.parameters_addition(total, vector)
        total = arithmetic.parameters_mod(total, FLOWER_MODULUS)
        for _ in range(sites):
            shapes = arithmetic.get_parameters_shape(total)
            mask = pseudo_rand_gen(seeds[0], FLOWER_MODULUS, shapes)
            total = arithmetic.parameters_subtraction(total, mask)
        total = arithmetic.parameters_mod(total, FLOWER_MODULUS)
        _, total = arithmetic.factor_extract(total)
        return dequantize(total, CLIP, FLOWER_TARGET)

    return Sides(client, server, sum(map(len, sent)))


def tenseal(values: RealVector, sites: int) -> Sides:
    """CKKS with the smallest ring that adds vectors at 128-bit security: 4096, 60 + 49 bits."""
    import tenseal as ts  # noqa: PLC0415

    context = ts.context(ts.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[60, 49])
    context.global_scale = 2**40
    pieces = [values[i : i + 2048] * 0.5 for i in range(0, len(values), 2048)]

    def client() -> list[bytes]:
        return [ts.ckks_vector(context, piece).serialize() for piece in pieces]

    sent = client()

    def server() -> list[bytes]:
        sums = []
        for part in sent:
            total = ts.ckks_vector_from(context, part)
            for _ in range(sites - 1):
                total += ts.ckks_vector_from(context, part)
            sums.append(total.serialize())
        return sums

    added = server()

    def opened() -> list[list[float]]:
        return [ts.ckks_vector_from(context, total).decrypt() for total in added]

    error = np.abs(np.concatenate(opened()) - sites * 0.5 * values).max()
    assert error < 1e-3, "TenSEAL's sum is wrong"
    return Sides(client, server, sum(map(len, sent)), opened)


def against_flower(
    values: RealVector,
    sites: int,
    chosen: argparse.Namespace,
    rows: list[Row],
    ratios: dict[str, float],
) -> None:
    """Both with the complete graph and with those of smaller degree."""
    degrees = degrees_for(sites)
    systems = {("flower", degree): flower(values, sites, degree) for degree in degrees}
    for degree in degrees:
        systems["fedward", degree] = fedward(values, sites, degree, chosen.bits, chosen.prg)
    tasks = {("client", *name): sides.client for name, sides in systems.items()}
    for name in ("fedward", "flower"):
        tasks["server", name, degrees[0]] = systems[name, degrees[0]].server
    cpu = best_of(tasks, chosen.repetitions if sites <= 10 else min(chosen.repetitions, 3))
    for (side, system, degree), seconds in cpu.items():
        row: dict[str, Any] = {"what": side, "system": system, "parameters": len(values)}
        row["sites"] = sites
        if side == "client":
            row["degree"] = degree
            row["megabytes"] = systems[system, degree].size_bytes / 1e6
        rows.append(row | {"bits": chosen.bits if system == "fedward" else 32, "cpu_s": seconds})
    for degree in degrees:
        for theirs in sorted({degree, degrees[0]}):
            name = f"client_{sites}_degree_{degree}_vs_flower_{theirs}"
            ratios[name] = cpu["client", "flower", theirs] / cpu["client", "fedward", degree]
    complete = degrees[0]
    against = cpu["server", "flower", complete] / cpu["server", "fedward", complete]
    ratios[f"server_{sites}_vs_flower"] = against
    sizes = [systems[name, complete].size_bytes for name in ("flower", "fedward")]
    ratios["wire_flower_to_fedward"] = sizes[0] / sizes[1]


def against_tenseal(
    values: RealVector,
    sites: int,
    chosen: argparse.Namespace,
    rows: list[Row],
    ratios: dict[str, float],
) -> None:
    """One cohort: TenSEAL's client does not depend on the number of sites."""
    try:
        theirs = tenseal(values, sites)
    except ImportError:
        print("TenSEAL is not installed; its rows are left out (pip install tenseal)")
        return
    ours = fedward(values, sites, degrees_for(sites)[-1], chosen.bits, chosen.prg)
    tasks = {
        "client": theirs.client,
        "server": theirs.server,
        "decryption": theirs.opened,
        "our client": ours.client,
        "our server": ours.server,
    }
    cpu = best_of(tasks, min(2, chosen.repetitions))
    for side in ("client", "server", "decryption"):
        row: dict[str, Any] = {
            "what": side,
            "system": "tenseal",
            "parameters": len(values),
            "sites": sites,
        }
        row |= {"megabytes": theirs.size_bytes / 1e6, "cpu_s": cpu[side]}
        rows.append(row)
    for side in ("client", "server"):
        ratios[f"{side}_{sites}_vs_tenseal"] = cpu[side] / cpu[f"our {side}"]
    # Our server ends with the sum in clear; theirs with a ciphertext that every site must decrypt.
    whole = cpu["server"] + cpu["decryption"]
    ratios[f"sum_in_clear_{sites}_vs_tenseal"] = whole / cpu["our server"]
    ratios["wire_tenseal_to_fedward"] = theirs.size_bytes / ours.size_bytes


def rings(
    values: RealVector,
    sites: int,
    chosen: argparse.Namespace,
    rows: list[Row],
    ratios: dict[str, float],
) -> None:
    """The client's work in each ring."""
    degree = degrees_for(sites)[-1]
    systems = {bits: fedward(values, sites, degree, bits, chosen.prg) for bits in (16, 24, 32)}
    cpu = best_of({str(bits): sides.client for bits, sides in systems.items()}, chosen.repetitions)
    for bits, sides in systems.items():
        row = {"what": "client", "system": "fedward", "parameters": len(values), "sites": sites}
        row |= {
            "degree": degree,
            "megabytes": sides.size_bytes / 1e6,
            "bits": bits,
            "cpu_s": cpu[str(bits)],
        }
        rows.append(row)
        ratios[f"bytes_per_parameter_{bits}_bits"] = sides.size_bytes / len(values)


def inner_loop(
    values: RealVector, chosen: argparse.Namespace, rows: list[Row], ratios: dict[str, float]
) -> None:
    """32 masks: the bare keystream, adding it, and the whole fused loop.

    On at most a million parameters and many repetitions, since these ratios are close to 1.
    """
    values = values[:1_000_000]
    keys = [os.urandom(32) for _ in range(32)]
    total = np.zeros(len(values), np.uint32)
    source = Quantised(values, Ring(BITS, 32), clip_range=CLIP, key=os.urandom(32))
    zeros, buffer = bytes(4 * CHUNK), bytearray(4 * CHUNK)

    def keystream() -> None:
        for key in keys:
            stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
            for start in range(0, len(values), CHUNK):
                size = 4 * min(CHUNK, len(values) - start)
                stream.update_into(zeros[:size], buffer)

    tasks: dict[str, Callable[[], object]] = {
        "keystream alone": keystream,
        "keystream, added": lambda: add_masks(total, keys, [], BITS),
        "AES-256-CTR, added": lambda: add_masks(total, keys, [], BITS, prg="aes-256-ctr"),
        "quantise, mask, pack": lambda: masked_wire(source, keys, [], BITS),
    }
    cpu = best_of(tasks, 5 * chosen.repetitions)
    about = {"parameters": len(values), "degree": 31}
    rows += [{"what": name, **about, "cpu_s": seconds} for name, seconds in cpu.items()]
    ratios["fused_vs_keystream"] = cpu["keystream alone"] / cpu["keystream, added"]
    ratios["whole_loop_vs_keystream"] = cpu["keystream alone"] / cpu["quantise, mask, pack"]
    ratios["aes_256_vs_chacha20"] = cpu["keystream, added"] / cpu["AES-256-CTR, added"]


def threads(
    values: RealVector, chosen: argparse.Namespace, rows: list[Row], ratios: dict[str, float]
) -> None:
    """The whole fused loop with 32 masks on one and on two threads, in wall time."""
    keys = [os.urandom(32) for _ in range(32)]
    source = Quantised(values, Ring(BITS, 32), clip_range=CLIP, key=os.urandom(32))

    def task(count: int) -> Callable[[], object]:
        return lambda: masked_wire(source, keys, [], BITS, threads=count)

    wall = best_of({n: task(n) for n in (1, 2)}, 2 * chosen.repetitions, time.perf_counter)
    about = {"parameters": len(values), "degree": 31}
    rows += [{"what": f"on {n} threads", **about, "wall_s": wall[n]} for n in wall]
    ratios["two_threads_vs_one"] = wall[1] / wall[2]


if __name__ == "__main__":
    main()
