"""fedward-site check: every line red with its remedy when the thing is wrong, and only then."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from site_cases import IDENTITIES, ROSTER, make_site, study, write_plan
from tls_cases import (
    DAY,
    NOW,
    closed_port,
    forward_proxy,
    tls_server,
    write_authority,
    write_certificate,
)

from client import commands_check, commands_study, enrolment
from client.cli import main
from client.config import Coordinator, SiteFolder
from client.connections import connections, proxy_of, sheet
from client.preflight import Line, Surroundings, check, exit_code
from shared.config import canonical_json
from shared.identity import Identity
from shared.kit import KIT, Address, Kit, Member
from shared.plan import StudyPlan
from shared.signed import seal

COORDINATOR = Identity.from_bytes(bytes([9] * 32))


class Place:
    """An enrolled site, and the CA of its project."""

    def __init__(self, folder: Path) -> None:
        self.path = make_site(folder / "site")
        self.folder = SiteFolder(self.path)
        self.authority = write_authority(folder / "ca")
        (self.path / "tls").mkdir()
        self.folder.ca_certificate.write_bytes(self.authority[1].read_bytes())
        enrolment.make_node_key(self.folder.node_key)
        pinned = Coordinator("heart", COORDINATOR.public.hex(), 0)
        self.folder.coordinator_file.write_bytes(canonical_json(pinned))

    def admit(self, server: Address, **changes: object) -> None:
        """Write a kit for a server at this address."""
        now = int(time.time())
        kit = Kit(
            project="heart",
            site="site-0",
            identity=IDENTITIES["site-0"].public.hex(),
            node_key=self.folder.node_key_public.read_text(),
            server=str(server),
            ca_certificate=self.authority[1].read_text(),
            issued=now,
            expires=now + 300 * 86400,
            requires_fedward=">=0.1",
            roster=tuple(Member(n, p.hex()) for n, p in ROSTER.items()),
            roster_serial=1,
        )
        self.folder.kit_file.write_bytes(seal(COORDINATOR, KIT, replace(kit, **changes)))

    def look(
        self,
        plan: StudyPlan | None = None,
        *,
        off_s: float = 0.0,
        environment: dict[str, str] | None = None,
    ) -> dict[str, Line]:
        """The lines of a check with a clock that is `off_s` seconds off."""
        around = Surroundings(lambda: time.time() + off_s, environment or {}, 60.0)
        lines = list(check(self.folder, plan, around))
        assert len({line.name for line in lines}) == len(lines)
        assert all(line.remedy for line in lines if line.state == "red")
        return {line.name: line for line in lines}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def server(place: Place, tmp_path: Path) -> Iterator[Address]:
    certificate = write_certificate(tmp_path / "tls", place.authority)
    with tls_server(certificate) as address:
        place.admit(address)
        yield address


def reds(lines: dict[str, Line]) -> set[str]:
    return {name for name, line in lines.items() if line.state == "red"}


def test_a_site_that_is_ready_has_no_red_line(place: Place, server: Address) -> None:
    lines = place.look(study())
    assert reds(lines) == set()
    assert exit_code(list(lines.values())) == 0
    assert {line.state for line in lines.values()} == {"green"}
    assert "TLSv1.3" in lines["server"].fact
    assert "20 patients" in lines["data"].private
    assert "after the plan" in lines["budget"].fact


def red_server(
    place: Place, tmp_path: Path, certificate: tuple[Path, Path], address: Address | None = None
) -> Line:
    with tls_server(certificate) as found:
        place.admit(address or found)
        lines = place.look()
    assert reds(lines) == {"server"}
    assert lines["clock"].state == "skipped"
    assert exit_code(list(lines.values())) == 4
    return lines["server"]


def test_another_ca_is_red(place: Place, tmp_path: Path) -> None:
    other = write_authority(tmp_path / "other")
    line = red_server(place, tmp_path, write_certificate(tmp_path / "tls", other))
    assert "not by the project's CA" in line.fact
    assert "ca_bundle" in line.remedy
    assert "call the coordinator" in line.remedy


def test_an_expired_certificate_is_red(place: Place, tmp_path: Path) -> None:
    expired = write_certificate(
        tmp_path / "tls", place.authority, begins=NOW - 90 * DAY, ends=NOW - DAY
    )
    line = red_server(place, tmp_path, expired)
    assert "has expired" in line.fact
    assert "project renew" in line.remedy


def test_a_certificate_of_tomorrow_is_red(place: Place, tmp_path: Path) -> None:
    early = write_certificate(tmp_path / "tls", place.authority, begins=NOW + DAY)
    line = red_server(place, tmp_path, early)
    assert "not valid yet" in line.fact
    assert "clock is behind" in line.remedy


def test_a_certificate_for_another_host_is_red(place: Place, tmp_path: Path) -> None:
    for host in ("fl.example.org", "192.0.2.7"):
        other = write_certificate(tmp_path / "tls", place.authority, host=host)
        line = red_server(place, tmp_path, other)
        assert "another name than localhost" in line.fact
        assert "advertised" in line.remedy


def test_a_certificate_that_soon_ends_is_red_before_it_does(place: Place, tmp_path: Path) -> None:
    soon = write_certificate(tmp_path / "tls", place.authority, ends=NOW + 10 * DAY)
    with tls_server(soon) as address:
        place.admit(address)
        lines = place.look()
    assert reds(lines) == {"server"}
    assert "project renew" in lines["server"].remedy
    assert lines["clock"].state == "green"


@pytest.mark.parametrize(
    ("off_s", "word"), [(86400, "ahead"), (30, "ahead"), (-86400, "behind"), (-600, "behind")]
)
def test_a_clock_that_is_off_is_red(place: Place, server: Address, off_s: float, word: str) -> None:
    lines = place.look(off_s=off_s)
    assert reds(lines) == {"clock"}
    assert word in lines["clock"].fact
    assert "time server" in lines["clock"].remedy
    # A clock that is a little behind does no harm, since Flower allows for it.
    assert reds(place.look(off_s=-60)) == set()


def test_without_a_date_the_clock_is_not_called_right(place: Place, tmp_path: Path) -> None:
    with tls_server(
        write_certificate(tmp_path / "tls", place.authority), tells_time=False
    ) as address:
        place.admit(address)
        assert place.look()["clock"].state == "skipped"


def test_a_closed_port_is_red(place: Place) -> None:
    with closed_port() as port:
        place.admit(Address("localhost", port))
        line = place.look()["server"]
    assert line.state == "red"
    assert "refuses the connection" in line.fact
    assert "it-sheet" in line.remedy


def test_an_unknown_name_is_red_and_ends_the_way(place: Place) -> None:
    place.admit(Address("nowhere.invalid", 443))
    lines = place.look()
    assert reds(lines) == {"name"}
    assert "cannot be resolved" in lines["name"].fact
    assert lines["server"].state == lines["clock"].state == "skipped"


def with_network(place: Place, text: str) -> None:
    file = place.path / "site.toml"
    file.write_text(file.read_text() + f"[network]\n{text}\n")


def test_through_the_hospitals_proxy(place: Place, server: Address) -> None:
    with forward_proxy() as (url, asked):
        with_network(place, f'proxy = "{url}"')
        lines = place.look()
        assert reds(lines) == set()
        assert {"proxy", "server"} <= set(lines)
        assert "name" not in lines  # the proxy resolves it
        assert asked[-1] == str(server)


def test_the_proxy_of_the_environment_is_taken_and_excepted(place: Place, server: Address) -> None:
    with forward_proxy() as (url, asked):
        assert "proxy" in place.look(environment={"https_proxy": url})
        assert str(server) in asked
        asked.clear()
        free = {"HTTPS_PROXY": url, "NO_PROXY": "other.example, localhost"}
        assert "proxy" not in place.look(environment=free)
        assert asked == []


def test_a_proxy_that_refuses_or_is_gone_is_red(place: Place, server: Address) -> None:
    with forward_proxy(allows=False) as (url, _):
        lines = place.look(environment={"HTTPS_PROXY": url})
    assert reds(lines) == {"server"}
    assert "403" in lines["server"].fact
    assert f"allow CONNECT to {server}" in lines["server"].remedy
    with closed_port() as port:
        gone = place.look(environment={"HTTPS_PROXY": f"http://127.0.0.1:{port}"})
    assert reds(gone) == {"proxy"}


def test_a_firewall_that_opens_tls_is_red_until_its_ca_is_named(
    place: Place, tmp_path: Path
) -> None:
    firewall = write_authority(tmp_path / "firewall", "firewall")
    with tls_server(write_certificate(tmp_path / "tls", firewall)) as address:
        place.admit(address)
        assert reds(place.look()) == {"server"}
        with_network(place, f'ca_bundle = "{firewall[1]}"')
        assert reds(place.look()) == set()


def test_what_is_wrong_on_the_site_is_red(place: Place, server: Address) -> None:
    plan = study()
    trials: list[tuple[Callable[[], object], str, str, int]] = [
        (lambda: place.admit(server, expires=int(time.time()) + 86400), "kit", "renew", 4),
        (lambda: place.admit(server, identity="11" * 32), "kit", "Join anew", 4),
        (lambda: place.admit(server, requires_fedward=">=99"), "version", "pip install", 2),
        ((place.path / "roster.json").unlink, "roster", "roster trust", 2),
        ((place.path / "train.safetensors").unlink, "data", "data prepare", 2),
        (lambda: (place.path / "policy.toml").chmod(0o666), "policy", "chmod", 3),
        ((place.path / "policy.toml").unlink, "policy", "policy init", 3),
    ]
    for spoil, name, remedy, code in trials:
        kept = {p: (p.read_bytes(), p.stat().st_mode) for p in place.path.iterdir() if p.is_file()}
        spoil()
        lines = place.look(plan)
        assert lines[name].state == "red", name
        assert remedy in lines[name].remedy, lines[name]
        # A site without a roster has no books either, so policy is red with it.
        assert reds(lines) <= {name, "policy"}
        assert exit_code(list(lines.values())) == code
        for path, (data, mode) in kept.items():
            path.write_bytes(data)
            path.chmod(mode)
    assert reds(place.look(plan)) == set()


def test_a_plan_beyond_policy_or_budget_is_red_with_code_3(
    place: Place, server: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = place.look(study(privacy={"clip_norm": 2.0}))
    assert reds(lines) == {"policy"}
    assert lines["budget"].state == "skipped"
    monkeypatch.setattr(commands_study, "_sensitivity", lambda plan, config: 1.0)
    for number in range(2):
        file = write_plan(study(f"number-{number}", training={"rounds": 18}), tmp_path / "p.toml")
        assert main(["--site", str(place.path), "approve", str(file), "--yes"]) == 0
    lines = place.look(study("number-2", training={"rounds": 18}))
    assert reds(lines) == {"budget"}
    assert exit_code(list(lines.values())) == 3
    assert "rounds" in lines["budget"].remedy


def test_a_gpu_that_is_wanted_and_not_there_is_red(place: Place, server: Address) -> None:
    file = place.path / "site.toml"
    file.write_text(file.read_text().replace('"cpu"', '"cuda"'))
    assert reds(place.look()) == {"device"}
    file.write_text(file.read_text().replace('"cuda"', '"auto"'))
    assert "no GPU" in place.look()["device"].fact


def test_a_folder_without_a_site_has_one_red_line(tmp_path: Path) -> None:
    lines = list(check(SiteFolder(tmp_path), None, Surroundings(time.time, {})))
    assert [(line.name, line.state) for line in lines] == [("settings", "red")]
    assert "enrol" in lines[0].remedy


def test_the_it_sheet_and_the_check_are_one_table(place: Place, server: Address) -> None:
    """A row that can be tried is a line of the check, and a try that is made is a row."""
    network = place.folder.config().network
    for environment in ({}, {"HTTPS_PROXY": "http://127.0.0.1:3128"}):
        rows = connections(server, proxy_of(network, environment, server.host))
        tried = {row.name for row in rows if row.probe}
        others = set(place.look(environment=environment)) - tried
        assert tried <= set(place.look(environment=environment))
        assert others == {
            *("settings", "kit", "version", "packages", "roster"),
            *("device", "disk", "data", "policy", "budget"),
        }
        shown = sheet("site-0", "heart", rows)
        for row in rows:
            for word in (row.name, row.destination, str(row.port or "-"), row.need, row.purpose):
                assert word in shown
        assert not any(row.direction == "in" and row.port for row in rows)
        outward = [row for row in rows if row.direction == "out" and row.need == "yes"]
        assert (server.host, server.port) in {(r.destination, r.port) for r in outward}


def test_the_command_prints_remedies_and_tells_programs_no_counts(
    place: Place,
    server: Address,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands_check, "_has_gpu", lambda: False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    plan = write_plan(study(), tmp_path / "plan.toml")
    words = ["--site", str(place.path), "check", str(plan)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "20 patients" in shown
    assert "\x1b" not in shown  # no terminal, no colour
    assert main([*words, "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["ready"] is True
    assert "patients" not in text
    (place.path / "train.safetensors").unlink()
    assert main(words) == 2
    assert "RED  data" in capsys.readouterr().out
    assert main(["--site", str(place.path), "it-sheet"]) == 0
    assert str(server.port) in capsys.readouterr().out
