"""From nothing to pinned: three sites and a coordinator, and everything that is refused on the way.

Both command lines run as people run them; files travel by hand.
"""

from __future__ import annotations

import json
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from project_cases import NAMES, Play

from client import enrolment
from server import provision
from server.cli import main as server_main
from shared import kit as kits
from shared.errors import ConfigError, FedwardError, PolicyError, ProtocolError
from shared.identity import Identity
from shared.kit import INVITATION, KIT, REQUEST, ROSTER, SECONDS_A_DAY
from shared.signed import seal, unseal

Edit = Callable[[bytes], bytes]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that commands write beside them stay with the test."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def play(tmp_path: Path) -> Play:
    made = Play(tmp_path)
    made.init()
    return made


@pytest.fixture
def joined(play: Play) -> Play:
    for name in NAMES:
        play.enrol(name)
        play.approve(name)
    for name in NAMES:
        assert play.join(name) == 0
    return play


def test_three_sites_are_in_with_two_commands_each(joined: Play) -> None:
    roster = {name: joined.of(name).identity().public for name in NAMES}
    for name in NAMES:
        assert joined.of(name).roster() == roster
        assert joined.commands[name] == 2
    active = joined.project.active(time.time())
    assert {name: site.identity for name, site in active.items()} == roster


def test_private_keys_are_private_and_stay_where_they_were_made(joined: Play) -> None:
    secrets = []
    for name in NAMES:
        folder = joined.of(name)
        secrets += [folder.identity_file, folder.node_key]
    project = joined.project
    for path in [*secrets, project.ca_key, project.tls_key, project.superexec_secret]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    pieces = [line for s in secrets for line in s.read_text().splitlines()[1:-1]]
    sent = [p for p in joined.folder.rglob("*.json") if p.is_file()]
    assert len(sent) > 10
    for path in sent:
        assert not any(piece in path.read_text() for piece in pieces), path
    planted = joined.folder / "planted.json"
    planted.write_text(pieces[0])
    assert any(piece in planted.read_text() for piece in pieces)


def test_openssh_reads_the_node_key(joined: Play) -> None:
    folder = joined.of("north")
    shown = subprocess.run(
        ["ssh-keygen", "-y", "-f", folder.node_key], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()[:2] == folder.node_key_public.read_text().split()[:2]


def changed(data: bytes, **fields: object) -> bytes:
    """The file with some of its body changed, and the old signature."""
    table = json.loads(data)
    table["body"] |= fields
    return json.dumps(table).encode()


def resigned(data: bytes, schema: str, cls: type, **fields: object) -> bytes:
    """The file with some of its body changed, signed by somebody else."""
    record = unseal(data, cls, schema, signer=None, where="test").record
    return seal(Identity.from_bytes(bytes(32)), schema, replace(record, **fields))


def test_a_swapped_request_is_refused(play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    play.enrol("north")
    read_out = play.of("north").identity().fingerprint
    # Somebody on the way takes the invitation, and sends a request with keys of his own.
    thief = Play(play.folder / "thief")
    invitation = play.file("north.invitation.json")
    mine = play.project.identity().fingerprint
    assert thief.site("north", "enrol", invitation, "--fingerprint", mine) == 0
    swapped = thief.of("north").request_file
    assert play.server("project", "approve", swapped, "--fingerprint", read_out) == 4
    assert "swapped on its way" in capsys.readouterr().err
    assert play.project.kit("north") is None
    play.approve("north")


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (lambda d: changed(d, site="south"), ProtocolError, "does not hold"),
        (lambda d: changed(d, identity="11" * 32), ProtocolError, "does not hold|does not prove"),
        (lambda d: d.replace(b'"fedward-request/1"', b'"fedward-kit/1"'), ProtocolError, "needed"),
        (lambda d: d[:-40], ProtocolError, "not a signed file"),
        (lambda d: b"[]", ProtocolError, "not a signed file"),
        (lambda d: resigned(d, REQUEST, kits.SiteRequest), ProtocolError, "put together"),
    ],
)
def test_an_altered_request_is_refused(
    play: Play, edit: Edit, error: type[FedwardError], match: str
) -> None:
    play.enrol("north")
    data = play.of("north").request_file.read_bytes()
    with pytest.raises(error, match=match):
        provision.examine(play.project, edit(data), time.time())
    provision.examine(play.project, data, time.time())


def test_a_request_with_another_sites_node_key_is_refused(play: Play) -> None:
    for name in ("north", "south"):
        play.enrol(name)
    play.approve("north")
    south = play.of("south")
    request = unseal(
        south.request_file.read_bytes(), kits.SiteRequest, REQUEST, signer=None, where="test"
    ).record
    stolen = play.of("north").node_key_public.read_text()
    with pytest.raises(ProtocolError, match="does not prove"):
        replace(request, node_key=stolen)


def test_an_invitation_serves_once(play: Play, tmp_path: Path) -> None:
    play.enrol("north")
    play.approve("north")
    again = Play(tmp_path / "again")
    mine = play.project.identity().fingerprint
    invitation = play.file("north.invitation.json")
    assert again.site("north", "enrol", invitation, "--fingerprint", mine) == 0
    data = again.of("north").request_file.read_bytes()
    with pytest.raises(ProtocolError, match="used up"):
        provision.examine(play.project, data, time.time())
    assert play.server("project", "invite", "north") == 3


def test_a_newer_invitation_makes_the_older_one_worthless(play: Play) -> None:
    play.enrol("north")
    old = play.of("north").request_file.read_bytes()
    provision.invite(play.project, "north", time.time())
    with pytest.raises(ProtocolError, match="latest invitation"):
        provision.examine(play.project, old, time.time())


def test_an_expired_invitation_is_refused_on_both_sides(play: Play) -> None:
    play.enrol("north")
    later = time.time() + 15 * SECONDS_A_DAY
    with pytest.raises(ProtocolError, match="expired"):
        provision.examine(play.project, play.of("north").request_file.read_bytes(), later)
    data = play.file("north.invitation.json").read_bytes()
    with pytest.raises(ProtocolError, match="expired"):
        enrolment.enrol(play.of("elsewhere"), data, later)
    assert not play.of("elsewhere").path.exists()


def test_a_false_coordinator_is_not_believed(play: Play) -> None:
    data = provision.invite(play.project, "north", time.time())
    forged = play.file("forged.json")
    forged.write_bytes(resigned(data, INVITATION, kits.Invitation, server="evil.example:443"))
    read_out = play.project.identity().fingerprint
    assert play.site("north", "enrol", forged, "--fingerprint", read_out) == 4
    assert not play.of("north").path.exists()
    # Without anybody to compare it with, nothing happens either.
    assert play.site("north", "enrol", forged) == 2


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda d: changed(d, server="evil.example:443"), "does not hold"),
        (lambda d: changed(d, expires=2**40), "does not hold"),
        (lambda d: resigned(d, KIT, kits.Kit), "another key"),
        (lambda d: d[:-30], "not a signed file"),
    ],
)
def test_an_altered_kit_is_refused(joined: Play, edit: Edit, match: str) -> None:
    folder = joined.of("north")
    data = folder.kit_file.read_bytes()
    with pytest.raises(ProtocolError, match=match):
        enrolment.join(folder, edit(data), time.time())
    folder.kit_file.write_bytes(edit(data))
    with pytest.raises(ProtocolError, match=match):
        folder.kit()
    enrolment.join(folder, data, time.time())


def test_a_kit_for_others_or_out_of_time_is_refused(joined: Play) -> None:
    folder, now = joined.of("north"), time.time()
    with pytest.raises(ProtocolError, match="is for site 'south'"):
        enrolment.join(folder, joined.of("south").kit_file.read_bytes(), now)
    data = folder.kit_file.read_bytes()
    with pytest.raises(ProtocolError, match="expired"):
        enrolment.join(folder, data, now + 400 * SECONDS_A_DAY)
    kit, identity = folder.kit(), joined.project.identity()
    for change, match in (
        ({"identity": "11" * 32}, "other keys"),
        ({"node_key": joined.of("south").node_key_public.read_text()}, "other keys"),
        ({"project": "lungs"}, "of project 'lungs'"),
    ):
        with pytest.raises(ProtocolError, match=match):
            enrolment.join(folder, seal(identity, KIT, replace(kit, **change)), now)
    newer = seal(identity, KIT, replace(kit, requires_fedward=">=99"))
    with pytest.raises(ConfigError, match="needs fedward >=99"):
        enrolment.join(folder, newer, now)


def test_a_forged_roster_is_refused(joined: Play) -> None:
    folder = joined.of("north")
    data = joined.project.roster_file.read_bytes()
    with pytest.raises(ProtocolError, match="another key"):
        enrolment.read_roster(folder, resigned(data, ROSTER, kits.Roster))
    with pytest.raises(ProtocolError, match="does not hold"):
        enrolment.read_roster(folder, changed(data, serial=99))


def test_no_site_is_pinned_on_the_coordinators_word(play: Play) -> None:
    """A coordinator that lies about a site's key is caught by the fingerprint of that site."""
    for name in NAMES:
        play.enrol(name)
        play.approve(name)
    folder = play.of("north")
    enrolment.join(
        folder, (play.project.site_folder("north") / "kit.json").read_bytes(), time.time()
    )
    roster = provision.read_roster(play.project)
    planted = Identity.generate()
    sites = tuple(
        kits.Member(m.name, planted.public.hex()) if m.name == "south" else m for m in roster.sites
    )
    file = play.file("roster.json")
    file.write_bytes(seal(play.project.identity(), ROSTER, replace(roster, sites=sites)))
    told = {n: f"{n}={play.of(n).identity().fingerprint}" for n in NAMES}
    pairs = [w for n in ("south", "west") for w in ("--fingerprint", told[n])]
    assert play.site("north", "roster", "trust", file, *pairs) == 4
    assert play.site("north", "roster", "trust", file) == 2  # nobody there to ask
    assert play.site("north", "roster", "trust", file, *pairs[2:]) == 4  # one was not told
    assert not folder.roster_file.exists()
    file.write_bytes(play.project.roster_file.read_bytes())
    assert play.site("north", "roster", "trust", file, *pairs) == 0
    assert folder.roster()["south"] == play.of("south").identity().public


def test_a_roster_that_misnames_this_very_site_is_refused(joined: Play) -> None:
    folder, roster = joined.of("north"), provision.read_roster(joined.project)
    others = tuple(m for m in roster.sites if m.name != "north")
    for sites in (others, (*others, kits.Member("north", "11" * 32))):
        with pytest.raises(ProtocolError, match="does not name this site"):
            enrolment.changes(folder, sites)


def test_a_revoked_site_is_out_and_cannot_come_back_by_an_old_roster(joined: Play) -> None:
    old = joined.file("old.json")
    old.write_bytes(joined.project.roster_file.read_bytes())
    key = joined.of("west").node_key_public.read_text()
    assert joined.server("project", "revoke", "west", "--reason", "left the project") == 0
    assert sorted(joined.project.active(time.time())) == ["north", "south"]
    assert [r.node_key for r in joined.project.revocations()] == [key]
    new = joined.file("new.json")
    assert joined.server("project", "roster", "--out", new) == 0
    assert joined.site("north", "roster", "trust", new) == 0  # nobody new: nothing to compare
    assert sorted(joined.of("north").roster()) == ["north", "south"]
    assert joined.site("north", "roster", "trust", old, "--yes") == 4
    # Neither key of the revoked site is admitted again, under whatever name.
    provision.invite(joined.project, "west", time.time())
    invitation = joined.project.invitation("west")
    assert invitation is not None
    again = enrolment._request(
        joined.of("west").identity(),
        joined.of("west").node_key,
        project="heart",
        site="west",
        token=invitation.token,
        now=time.time(),
    )
    with pytest.raises(PolicyError, match="was revoked"):
        provision.examine(joined.project, again, time.time())


def test_after_revocation_a_site_enrols_under_a_new_identity(joined: Play) -> None:
    first = joined.of("west").identity().public
    assert joined.server("project", "revoke", "west") == 0
    (joined.folder / "west").rename(joined.folder / "west-lost")
    joined.enrol("west")
    joined.approve("west")
    assert joined.project.active(time.time())["west"].identity != first


def test_renewal_is_signed_by_the_admitted_identity_and_may_change_the_node_key(
    joined: Play,
) -> None:
    folder, project = joined.of("north"), joined.project
    before = folder.node_key_public.read_text()
    assert joined.site("north", "renew", "--new-node-key") == 0
    assert folder.node_key_public.read_text() == before  # until the new kit has come
    later = time.time() + 300 * SECONDS_A_DAY
    data = (folder.path / "renewal.json").read_bytes()
    with pytest.raises(ProtocolError, match="not signed by the identity"):
        provision.renew(project, resigned(data, REQUEST, kits.SiteRequest), later)
    kit = provision.renew(project, data, later)
    assert kit.expires > folder.kit().expires
    assert kit.node_key != before
    enrolment.join(folder, (project.site_folder("north") / "kit.json").read_bytes(), later)
    assert folder.node_key_public.read_text() == kit.node_key
    with pytest.raises(ProtocolError, match="older than its kit"):
        provision.renew(project, data, later)


def test_a_site_that_did_not_renew_is_in_no_cohort(joined: Play) -> None:
    later = time.time() + 366 * SECONDS_A_DAY
    assert joined.project.active(later) == {}
    assert {s.state for s in joined.project.sites(later)} == {"expired"}
    data = enrolment.renew(joined.of("north"), time.time() + 1, new_node_key=False)
    provision.renew(joined.project, data, later)
    assert sorted(joined.project.active(later)) == ["north"]


def test_what_people_see_names_both_fingerprints(
    play: Play, capsys: pytest.CaptureFixture[str]
) -> None:
    play.enrol("north")
    shown = capsys.readouterr().out
    assert play.project.identity().fingerprint in shown
    assert play.of("north").identity().fingerprint in shown
    play.approve("north")
    assert play.of("north").identity().fingerprint in capsys.readouterr().out
    assert play.server("project", "list") == 0
    assert "active" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("project", "list"), 2),
        (("project", "kit", "nobody"), 2),
        (("project", "invite", "No Such!"), 2),
    ],
)
def test_mistakes_end_with_their_code(
    tmp_path: Path, words: tuple[str, ...], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert server_main([*words, "--project", str(tmp_path)]) == code
    assert "project init" in capsys.readouterr().err


def test_a_typed_fingerprint_is_compared(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    file = play.file("north.invitation.json")
    play.server("project", "invite", "north", "--out", file)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: "no")
    assert play.site("north", "enrol", file) == 4
    last = play.project.identity().fingerprint[-4:]
    monkeypatch.setattr("builtins.input", lambda prompt: last)
    assert play.site("north", "enrol", file) == 0
    assert play.site("north", "enrol", file) == 2  # an identity is never replaced
