"""Layers that stay at each site: out of the masked vector, noised, kept over restarts, used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from study_cases import Sites
from training_cases import make_plan

from client.app import forget_sites
from client.config import SiteFolder
from client.noise import ChaChaRandom
from client.own_model import FOLDER, own_folder, usable
from client.own_state import OwnState
from shared.distributed import noise_share
from shared.errors import ConfigError
from shared.layout import VectorLayout
from shared.models import build_model, initial_parameters, parameter_spec
from shared.optimizers import initial_state
from shared.personal import sent_coordinates
from shared.plan import StudyPlan
from shared.released import ReleasedModel, model_files, model_key, read_model
from simulations.audits.verify import verify
from simulations.grid import Delivery, Direction, no_faults
from simulations.run import RunOptions, execute, prepare
from simulations.scenario import load_scenario

SMALL = ("model.name=mlp", "model.hidden=[6]", "training.rounds=2", "privacy.epsilon=8.0")
HEAD = 6 + 1
"""The head's coordinates, after 30 x 6 + 6 of the hidden layer."""


def test_norms_and_named_layers_stay() -> None:
    cnn = make_plan("cnn", image=16, model={"width": 4, "personal": ["norms"]})
    spec = parameter_spec(build_model(cnn))
    sent = set(sent_coordinates(cnn).tolist())
    start, kept = 0, []
    for name, size in zip(spec.names, spec.sizes, strict=True):
        own = [i not in sent for i in range(start, start + size)]
        assert all(own) or not any(own)
        kept += [name] * all(own)
        start += size
    assert kept
    assert all(name.rpartition(".")[0] in norms_of(cnn) for name in kept)
    mlp = make_plan("mlp", model={"hidden": [6], "personal": ["head"]})
    assert sent_coordinates(mlp).tolist() == list(range(36))  # 5 x 6 + 6, and 7 of the head


def norms_of(plan: StudyPlan) -> list[str]:
    named = build_model(plan).named_modules()
    return [name for name, part in named if type(part).__name__ == "GroupNorm"]


@pytest.mark.parametrize(
    ("personal", "reason"),
    [
        (["tail"], "no such layer"),
        (["norms"], "no such layer"),  # a perceptron has none
        (["head", "layers"], "nothing would be learnt together"),
        (["head", "head"], "each once"),
    ],
)
def test_what_cannot_stay_is_refused(personal: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        sent_coordinates(make_plan("mlp", model={"personal": personal}))


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_own_layers_never_leave_and_the_common_model_does_not_move_there(mode: str) -> None:
    privacy = {"mode": mode}
    plan = make_plan("mlp", model={"hidden": [6], "personal": ["head"]}, privacy=privacy)
    layout = VectorLayout(plan, 43)
    assert layout.sent == 36
    assert layout.length == 36
    everything = make_plan("mlp", model={"hidden": [6]}, privacy=privacy)
    assert VectorLayout(everything, 43).length == 43
    if mode == "distributed":
        assert layout.share == noise_share(plan, 36)
        return
    update = np.linspace(-0.5, 0.5, 43, dtype=np.float32)
    packed = layout.pack(update, 1.0, np.zeros(0, dtype=np.int64), bytes(32))
    changed = update.copy()
    changed[36:] = 9.0
    again = layout.pack(changed, 1.0, np.zeros(0, dtype=np.int64), bytes(32))
    vectors = []
    for source in (packed, again):
        assert source.length == 36
        vectors.append(np.empty(36, dtype=np.uint32))
        source.reader(0)(vectors[-1])
    np.testing.assert_array_equal(*vectors)  # whatever the head's update is, nobody sees it
    back = layout.update_of(vectors[0], plan.cohort.names[:1])
    np.testing.assert_allclose(back[:36], update[:36], atol=1e-4)
    assert not back[36:].any()


def test_the_own_step_of_a_distributed_round_carries_all_the_noise() -> None:
    """Without the shares of others: sigma C over the site's own divisor, in every coordinate."""
    plan = make_plan(
        "mlp", features=200, model={"hidden": [40], "personal": ["layers.0"]},
        privacy={"mode": "distributed", "clip_norm": 0.7},
    )  # fmt: skip
    layout = VectorLayout(plan, parameter_spec(build_model(plan)).length)
    state = initial_state(plan.optimizer, initial_parameters(plan))
    store: dict[str, bytes] = {}
    own = OwnState(layout, store, "site-0")
    nobody = np.zeros(layout.parameters, dtype=np.float32)
    own.stepped(state.parameters, nobody, 10.0, ChaChaRandom(bytes(32)))
    moved = own.parameters(state) - state.parameters
    assert not np.delete(moved, own.places).any()
    share = layout.share
    assert share is not None
    promised = share.noise_multiplier * 0.7 / 10.0 * plan.training.learning_rate
    assert float(moved[own.places].std()) == pytest.approx(promised, rel=0.05)
    assert np.unique(moved[own.places]).size > 7000  # no two coordinates share a draw
    # A site that was restarted goes on from the same.
    again = OwnState(layout, store, "site-0").parameters(state)
    np.testing.assert_array_equal(again, own.parameters(state))


def test_each_site_has_a_head_of_its_own_in_the_end(tmp_path: Path) -> None:
    overrides = [*SMALL, 'model.personal=["head"]', "privacy.mode=distributed"]
    sites = Sites(load_scenario("breast_cancer", overrides), tmp_path)
    outcome = sites.study("run-1")
    common, start = outcome.state.parameters, initial_parameters(sites.plan)
    np.testing.assert_array_equal(common[-HEAD:], start[-HEAD:])
    assert np.abs(common[:-HEAD] - start[:-HEAD]).min() > 0
    key = model_key(sites.plan, common)
    heads = []
    for folder in sites.folders.values():
        own = read_model(own_folder(SiteFolder(folder), key)).parameters
        np.testing.assert_array_equal(own[:-HEAD], common[:-HEAD])
        heads.append(own[-HEAD:].tobytes())
    assert len(set(heads)) == len(sites.folders)


def closing(site: str, action: str, direction: Direction, body: bytes) -> Delivery:
    """Every site is closed before each message, and opened from its folder again."""
    forget_sites()
    return no_faults(site, action, direction, body)


def test_own_layers_outlive_restarts(tmp_path: Path) -> None:
    """A site that is closed after every message ends with the head that it would have had."""
    overrides = [*SMALL, 'model.personal=["head"]']
    ends = []
    for name, hook in (("a", no_faults), ("b", closing)):
        sites = Sites(load_scenario("breast_cancer", overrides), tmp_path / name)
        outcome = sites.study("run-1", faults=hook)
        key = model_key(sites.plan, outcome.state.parameters)
        folders = sites.folders.values()
        ends.append([read_model(own_folder(SiteFolder(f), key)).parameters for f in folders])
    np.testing.assert_array_equal(*ends)
    assert not np.array_equal(ends[0][0], ends[0][1])


def test_a_run_verifies_is_tested_by_own_models_and_says_where_to_predict(tmp_path: Path) -> None:
    overrides = [*SMALL, 'model.personal=["head"]', "training.rounds=8"]
    out = tmp_path / "run"
    results = execute(
        prepare(load_scenario("breast_cancer", overrides), RunOptions(out=out)), lambda report: None
    )
    assert not verify(out).violated
    assert results["final"]["metrics"]["auroc"] > 0.9
    assert all(site["auroc"] > 0.8 for site in results["final"]["per_site"].values())
    model, stranger = read_model(out), SiteFolder(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="This site took no part"):
        usable(stranger, model)
    folder = stranger.path / FOLDER / model.key
    folder.mkdir(parents=True)
    for name, data in model_files(model.plan, model.parameters + 1, {}).items():
        (folder / name).write_bytes(data)
    asked, own = usable(stranger, model)
    assert own
    assert asked.parameters[0] == model.parameters[0] + 1
    with pytest.raises(ConfigError, match="Leave --as-released out"):
        usable(stranger, model, as_released=True)
    assert isinstance(asked, ReleasedModel)
