"""The walking path as its user walks it: one command, a run directory, errors in one paragraph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray_studies
from ray_studies import ENDS, FEDAVG, KEEPING, RUN, ends, sites_of
from safetensors.numpy import load_file

import client
from server.results import read_results
from shared import plan as plans
from shared.evidence import RECORD_FILE, DealsSeen, EpochOpened, RoundEnded, read_record_file
from shared.identity import verify
from shared.messages import decode, kind_of
from shared.secagg.messages import S2
from shared.study import Receipt
from simulations.audits.cli import main as audit
from simulations.cli import main
from simulations.terminal import final_table

FRESH = ["--rounds", "2", "--set", "evaluation.bins=64", "--quiet"]
QUICK = [*FRESH, "--insecure-reproducible"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    assert main(["run", "--out", str(out), *QUICK]) == 0
    return out


def test_a_run_leaves_everything_that_the_design_promises(run_folder: Path) -> None:
    names = {p.name for p in run_folder.iterdir()}
    assert {"results.json", "report.html", "model.safetensors", "model.json", "evidence"} <= names
    results = read_results(run_folder / "results.json")
    assert [r["round"] for r in results["rounds"]] == [1, 2]
    assert results["final"]["metrics"]["auroc"] > 0.9
    assert set(results["final"]["per_site"]) == set(results["cohort"]["sites"])


def test_what_was_promised_is_what_was_charged(run_folder: Path) -> None:
    results = read_results(run_folder / "results.json")
    target = results["privacy"]["target_epsilon"]
    for site in results["privacy"]["sites"].values():
        assert site["steps"] == 2 * 5
        assert 0.9 * target < site["epsilon"] <= target


def test_the_model_file_is_the_model_that_every_site_signed_for(run_folder: Path) -> None:
    about = json.loads((run_folder / "model.json").read_text())
    evidence = json.loads((run_folder / "evidence" / "receipts.json").read_text())
    plan = plans.from_bytes((run_folder / "evidence" / "plan.json").read_bytes())
    assert about["plan_sha256"] == plan.sha256 == evidence["plan_sha256"]
    receipts = {
        name: decode(Receipt, bytes.fromhex(r["receipt"]))
        for name, r in evidence["receipts"].items()
    }
    assert set(receipts) == set(plan.cohort.names)
    assert {r.model_sha256.hex() for r in receipts.values()} == {about["state_sha256"]}
    assert {r.transcript.hex() for r in receipts.values()} == {evidence["transcript"]}
    tensors = load_file(run_folder / "model.safetensors")
    assert sum(t.size for t in tensors.values()) == 31


def model_of(out: Path, *arguments: str) -> np.ndarray:
    assert main(["run", "--out", str(out), *arguments]) == 0
    return parameters_of(out)


def parameters_of(out: Path) -> np.ndarray:
    return np.concatenate([t.ravel() for t in load_file(out / "model.safetensors").values()])


def test_a_run_that_was_asked_to_repeat_does_and_another_seed_gives_another(
    run_folder: Path, tmp_path: Path
) -> None:
    first = parameters_of(run_folder)
    np.testing.assert_array_equal(model_of(tmp_path / "again", *QUICK), first)
    other = model_of(tmp_path / "other", "--seed", "5", *QUICK)
    assert not np.array_equal(other, first)


def test_no_seed_fixes_noise_unless_it_was_asked_for(run_folder: Path, tmp_path: Path) -> None:
    """Not in the study, and not in the baseline that trains under the same promise."""
    found = []
    for out in (tmp_path / "one", tmp_path / "two"):
        model = model_of(out, *FRESH, "--baselines")
        results = read_results(out / "results.json")
        assert "insecure_reproducible" not in results
        assert "INSECURE" not in (out / "report.html").read_text()
        found.append((model, results["baselines"]))
    (one, first), (two, second) = found
    assert all(not np.array_equal(one, m) for m in (two, parameters_of(run_folder)))
    assert first["pooled_dp"]["metrics"]["brier"] != second["pooled_dp"]["metrics"]["brier"]
    # The seed still fixes the split, the start and, without privacy, the order of the records.
    assert first["pooled"] == second["pooled"]
    assert first["local"] == second["local"]


def test_without_privacy_the_seed_fixes_all_and_there_is_nothing_to_brand(tmp_path: Path) -> None:
    off = ["--set", "privacy.mode=none", *FRESH]
    one = model_of(tmp_path / "one", *off)
    np.testing.assert_array_equal(model_of(tmp_path / "two", *off), one)
    np.testing.assert_array_equal(model_of(tmp_path / "asked", *off, QUICK[-1]), one)
    assert "insecure_reproducible" not in read_results(tmp_path / "asked" / "results.json")


def test_a_reproducible_run_is_branded_and_no_audit_lets_it_pass(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = read_results(run_folder / "results.json")
    assert results["insecure_reproducible"] is True
    page = (run_folder / "report.html").read_text()
    assert 'class="banner"><strong>INSECURE, REPRODUCIBLE: the noise follows' in page
    shown = final_table(results)
    assert shown.splitlines()[2].startswith("INSECURE, REPRODUCIBLE")
    assert audit(["verify", str(run_folder)]) == 5
    assert "--insecure-reproducible" in capsys.readouterr().out


def test_no_key_of_the_secure_sum_follows_from_the_seed(run_folder: Path, tmp_path: Path) -> None:
    """Even in a run that repeats to the bit: identities, masks' keys and so all masked vectors."""
    model_of(tmp_path / "again", *QUICK)
    found: list[dict[str, set[bytes]]] = []
    for out in (run_folder, tmp_path / "again"):
        seen: dict[str, set[bytes]] = {"identity": set(), "keys": set(), "masked": set()}
        for record in read_record_file(out / "evidence" / RECORD_FILE).records:
            if kind_of(record) is EpochOpened:
                seen["identity"] |= set(decode(EpochOpened, record).roster.values())
            elif kind_of(record) is DealsSeen and (deals := decode(DealsSeen, record)).step != S2:
                seen["keys"] |= {deal.common for deal in deals.deals}
            elif kind_of(record) is RoundEnded:
                seen["masked"] |= {c.root for c in decode(RoundEnded, record).contributions}
        found.append(seen)
    one, two = found
    for kind, values in one.items():
        assert len(values) >= 4
        assert not values & two[kind], kind


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["brest_cancer"], ["no scenario 'brest_cancer'", "Did you mean 'breast_cancer'"]),
        (["--set", "privacy.epslon=2"], ["epslon", "epsilon"]),
        (["--set", "privacy.epsilon=-2"], ["epsilon is -2", "above 0"]),
        (["--set", "cohort.threshold=2"], ["threshold is 2", "valid: 3 to 4"]),
        (["--rounds", "0"], ["--rounds is 0"]),
        (["--set", "model.name='resnet'"], ["unknown model 'resnet'", "resnet18"]),
        (["heart", "--data", "nowhere"], ["nowhere", "processed.cleveland.data"]),
        (["--set", "privacy.noise_multiplier=0.5"], ["noise_multiplier 0.5", "epsilon"]),
    ],
)
def test_a_mistake_is_one_paragraph_code_2_and_no_folder(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["run", *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedward-sim: ")
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []


def test_a_run_never_overwrites_another(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run_folder / "results.json").read_bytes()
    assert main(["run", "--out", str(run_folder), *QUICK]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (run_folder / "results.json").read_bytes() == before


def test_receipts_verify_under_the_sites_identities_only() -> None:
    from shared.errors import ProtocolError  # noqa: PLC0415
    from shared.identity import Identity  # noqa: PLC0415

    identity, stranger = Identity.generate(), Identity.generate()
    signature = identity.sign("receipt", b"x")
    verify(identity.public, "receipt", b"x", signature, who="a")
    for public, context, payload in (
        (stranger.public, "receipt", b"x"),
        (identity.public, "agree", b"x"),
        (identity.public, "receipt", b"y"),
    ):
        with pytest.raises(ProtocolError):
            verify(public, context, payload, signature, who="a")


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """In a process of its own, as a user starts it: Ray's daemons outlive a call within one."""
    folder = tmp_path_factory.mktemp("ray")
    command = [sys.executable, ray_studies.__file__, str(folder), "--out", str(folder / "out")]
    root = {**os.environ, "PYTHONPATH": str(Path(client.__file__).parents[1])}
    done = subprocess.run([*command, *QUICK], env=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads((folder / ENDS).read_text())


@pytest.mark.slow
def test_the_ray_engine_ends_with_the_very_same_model(
    run_folder: Path, on_ray: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    first, ray = (load_file(f / "model.safetensors") for f in (run_folder, on_ray[0]))
    for name, tensor in first.items():
        np.testing.assert_array_equal(ray[name], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("name", KEEPING)
def test_what_sites_keep_between_rounds_is_kept_on_ray(
    name: str, on_ray: tuple[Path, dict[str, dict[str, str]]], tmp_path: Path
) -> None:
    """There each message may reach another process; and what is kept is used."""
    sites = sites_of(KEEPING[name], tmp_path / "with")
    here = ends(sites, sites.study(RUN))
    assert on_ray[1][name] == here
    heads = {here[site] for site in sites.plan.cohort.names if site in here}
    assert len(heads) == 4 * (name == "own head")
    if name == "SCAFFOLD":
        plain = sites_of(FEDAVG, tmp_path / "without")
        assert ends(plain, plain.study(RUN))["model"] != here["model"]
