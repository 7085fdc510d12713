"""A whole deployment on this machine: real SuperLink, proxy, SuperNodes and workers, over TLS.

One project with four sites is started once, and everything here happens to it: a study whose model
is withheld, one whose site and SuperLink are killed, a changed bundle, a stranger, and whatever the
outside may try. `make fault-matrix` plays all the rest.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.cli import main as site_command
from client.config import SiteFolder
from server.link import connect
from shared.identity import Identity
from shared.model_plan import ModelPlan
from shared.plan import AuditPlan, OptimizerPlan
from simulations.audits.cli import main as audit
from simulations.audits.finding import Finding, Verdict
from simulations.audits.verification import Expected
from simulations.audits.verify import verify
from simulations.deployment import Deployment, breast_cancer, deployed, wait_for
from simulations.fault_play import Play
from simulations.fault_sites import call_as_stranger, changed_bundle, was_refused
from simulations.meddler import Meddler
from simulations.replay import in_process
from simulations.scenario import Scenario, plan_toml

pytestmark = pytest.mark.slow

ROUNDS = 3


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    """Four sites with fixed noise, so that a run can be repeated in one process."""
    found = breast_cancer(ROUNDS, timeout_s=60.0, spare_rounds=2)
    return replace(found, plan=replace(found.plan, model=ModelPlan("mlp", hidden=(8,))))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, scenario: Scenario) -> Iterator[Deployment]:
    """The project, running, with all four sites connected."""
    with deployed(tmp_path_factory.mktemp("deployment"), scenario) as deployment:
        deployment.start_all()
        yield deployment


@pytest.fixture(scope="module")
def auditor() -> Identity:
    """Whom the gated plan names."""
    return Identity.generate()


@pytest.fixture(scope="module")
def gated(live: Deployment, auditor: Identity) -> Deployment:
    """The same sites, with a plan that asks for an audit before its model leaves the server.

    Each site keeps a head of its own and a control variate (SCAFFOLD) from round to round.
    """
    gate = AuditPlan(gate=True, auditor=auditor.public.hex())
    own_head = replace(live.plan.model, personal=("head",))
    # As many charged steps as the sites' policy was written for, and so the same noise.
    training = replace(live.plan.training, rounds=ROUNDS - 1, spare_rounds=3)
    plan = replace(
        live.plan,
        name="gated",
        model=own_head,
        training=training,
        optimizer=OptimizerPlan("scaffold"),
        audit=gate,
    )
    return replace(live, scenario=replace(live.scenario, plan=plan))


@pytest.fixture(scope="module")
def undisturbed(gated: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a gated study that nothing disturbs, once it is over."""
    gated.approve()
    file = tmp_path_factory.mktemp("gated") / "gated.toml"
    file.write_text(plan_toml(gated.plan))
    process = gated.run(str(file))
    assert process.popen.wait(400) == 5, process.text
    assert "the model is withheld: the plan asks for an audit before export" in process.text
    return gated.latest_run()


def test_a_study_ends_with_the_model_that_one_process_computes(
    gated: Deployment, undisturbed: Path
) -> None:
    rounds = gated.rounds()
    assert [r["contributors"] for r in rounds] == [list(gated.names)] * ROUNDS  # the last one tests
    assert not any(r["aborted"] for r in rounds)
    assert gated.status()["sha256"] == in_process(gated, undisturbed.name)
    for file in ("results.json", "report.html", "evidence/receipts.json"):
        assert (undisturbed / file).stat().st_size > 0
    results = json.loads((undisturbed / "results.json").read_text())
    assert results["engine"] == "deployment"
    assert len(results["privacy"]["sites"]) == 4


def test_its_model_leaves_the_server_only_once_its_audit_has_passed(
    undisturbed: Path, auditor: Identity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, key = undisturbed, tmp_path / "auditor.pem"
    auditor.save(key)
    report = ["report", str(run), "--quick", "--key", str(key)]
    verdicts: list[Verdict] = ["violated"]

    def found(name: str, target: Any, options: Any) -> list[Finding]:
        return [Finding(name, "example", "holds", "none", 1.0, None, 0.01, (), verdicts[-1])]

    # The probes have tests of their own; evidence, signature and gate are the real ones.
    monkeypatch.setattr("simulations.audits.families.attack", found)
    for code in (5, 0):
        assert not (run / "model.safetensors").exists()
        assert audit(["release", str(run)]) == 5  # missing, then failed
        assert audit(report) == code
        verdicts.append("not refuted")
    assert audit(["release", str(run)]) == 0
    assert (run / "model.safetensors").exists()
    assert not verify(run).violated


def test_a_site_and_the_superlink_are_killed_and_the_study_ends_as_it_would(
    live: Deployment,
) -> None:
    live.approve()
    process = live.run(str(live.plan_file))
    wait_for("the first round", lambda: live.rounds() and live.status()["state"] == "running")
    for child in ("supernode", "worker"):
        os.kill(live.site_pid("county", child), signal.SIGKILL)
    wait_for("the second round", lambda: len(live.rounds()) > 1)
    before = live.server_pid("superlink")
    os.kill(before, signal.SIGKILL)
    assert process.popen.wait(400) == 0, process.text
    assert live.status()["state"] == "finished"
    assert live.server_pid("superlink") != before
    rounds = live.rounds()
    with_county = ["county" in r["contributors"] for r in rounds]
    assert with_county[0]
    assert all(len(r["contributors"]) >= 3 for r in rounds if not r["aborted"])
    assert sum(not r["aborted"] for r in rounds) == ROUNDS + 1
    assert live.status()["sha256"] == in_process(live, live.latest_run().name)
    assert (live.latest_run() / "model.safetensors").stat().st_size > 0  # nothing withholds it
    wait_for("county", lambda: live.online() == set(live.names))


def test_the_runs_evidence_holds_with_the_sites_exports_and_all_keys_known(
    live: Deployment,
) -> None:
    """Of the study that was disturbed."""
    run, expected = with_exports(live), known(live)
    found = verify(run, expected)
    assert [(f.name, f.explanation) for f in found.findings if f.verdict != "not refuted"] == []
    assert {"seal", "coordinator", "same-rounds", "charges"} <= {f.name for f in found.findings}
    stranger = Identity.generate().fingerprint
    wrong = verify(run, replace(expected, coordinator=stranger))
    assert [f.name for f in wrong.findings if f.verdict == "violated"] == ["coordinator"]
    ledger = run / "evidence" / "sites" / "city" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('\\"steps\\":5', '\\"steps\\":4', 1))
    spoilt = {f.name for f in verify(run, expected).findings if f.verdict == "violated"}
    assert "ledger" in spoilt


def known(live: Deployment) -> Expected:
    """What people told an auditor over the telephone."""
    sites = {name: SiteFolder(live.site(name)).identity().fingerprint for name in live.names}
    return Expected(live.plan.sha256, sites, live.project.identity().fingerprint)


def with_exports(live: Deployment) -> Path:
    """The latest run's folder, with every site's evidence as its engineer exports it."""
    run = live.latest_run()
    for name in live.names:
        target = run / "evidence" / "sites" / name
        command = ["--site", str(live.site(name)), "evidence", run.name, str(target)]
        assert site_command(command) == 0
    return run


def test_a_changed_bundle_is_refused_and_nothing_of_it_is_installed(live: Deployment) -> None:
    changed_bundle(Play(live, Meddler()))
    assert "No usable answer came from city, county, rural" in live.status()["error"]


def test_a_stranger_with_the_authority_but_no_registered_key_is_refused(
    live: Deployment, tmp_path: Path
) -> None:
    call = call_as_stranger(live, tmp_path)
    assert was_refused(call), call.stderr
    assert live.online() == set(live.names)


def test_the_outside_reaches_no_other_path_and_takes_no_task(live: Deployment) -> None:
    from flwr.proto.runtime_pb2 import AcquireTaskRequest  # noqa: PLC0415
    from flwr.supercore.constant import TaskType  # noqa: PLC0415
    from flwr.supercore.runtime import RuntimeHttpClient  # noqa: PLC0415

    authority = (live.project.ca_certificate).read_bytes()
    outside = str(live.project.bind)
    verify = ssl.create_default_context(cadata=authority.decode())
    with httpx.Client(base_url=f"https://{outside}", verify=verify) as client:
        for path in (
            "/v1/control/start-run",
            "/v1/control/list-nodes",
            "/v1/control/register-node",
            "/v1/runtime/acquire-task",
            "/v1/fleet/register-node",
            "/docs",
            "/openapi.json",
            "/health",
        ):
            assert client.post(path).status_code == 404, path
    request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
    health = live.health()
    assert health is not None
    link = f"127.0.0.1:{health['link_port']}"
    for address, status in ((outside, 404), (link, 401)):
        thief = RuntimeHttpClient.from_server_address(address, False, authority, [])
        with closing(thief), pytest.raises(httpx.HTTPStatusError) as refused:
            thief.AcquireTask(request)
        assert refused.value.response.status_code == status


def test_the_superlink_listens_on_loopback_alone(live: Deployment) -> None:
    health = live.health()
    assert health is not None
    other = _own_address()
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex((other, int(health["link_port"]))) != 0
    with connect(live.project, int(health["link_port"])) as link:
        assert len(link.nodes()) == 4


def _own_address() -> str:
    """An address of this machine besides loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            pytest.skip("this machine has no address besides loopback")
