"""enrol, join, roster, renew: this hospital's way into a project."""

from __future__ import annotations

import argparse
import getpass
import sys
import time
from pathlib import Path

from client import enrolment
from client.config import SiteFolder
from shared.command import Commands, heard
from shared.errors import ConfigError, ProtocolError
from shared.files import read_bytes, replace_file
from shared.identity import fingerprint
from shared.kit import ROSTER, Member, day
from shared.service import Service, write_files
from shared.signed import schema_of
from shared.version import fedward_version


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-site."""
    enrol = commands.add_parser(
        "enrol",
        help="make this site's keys, and the request to send to the coordinator",
        description="The keys are made here and never leave. Shows the coordinator's fingerprint "
        "and asks for what is read to you by telephone: call a number that you know.",
    )
    enrol.add_argument("invitation", type=Path, help="the file that the coordinator sent")
    enrol.add_argument(
        "--fingerprint", metavar="F", help="the coordinator's, whole, as it was read"
    )
    enrol.add_argument("--out", type=Path, metavar="FILE", help="default: SITE.request.json")
    enrol.set_defaults(command=_enrol, recorded="enrol")

    join = commands.add_parser(
        "join",
        help="take the coordinator's kit, and pin the other sites",
        description="The kit must answer exactly this site's keys. The other sites that it names "
        "are pinned only once you have compared their fingerprints.",
    )
    join.add_argument("kit", type=Path, help="the file that the coordinator sent")
    _add_confirmation(join)
    join.set_defaults(command=_join, recorded="join")

    roster = commands.add_parser("roster", help="the other sites' identities, as pinned here")
    actions = roster.add_subparsers(required=True, metavar="ACTION")
    trust = actions.add_parser(
        "trust",
        help="pin what a roster or kit names, once fingerprints were compared",
        description="Shows every site's fingerprint. Nothing is pinned on the server's word: "
        "compare each new one with that hospital itself.",
    )
    trust.add_argument(
        "roster", type=Path, help="a signed roster or kit (default: kit.json)", nargs="?"
    )
    _add_confirmation(trust)
    trust.set_defaults(command=_trust, recorded="roster trust")
    show = actions.add_parser("show", help="what is pinned")
    show.set_defaults(command=_show)

    service = commands.add_parser(
        "service", help="write a systemd unit, a Dockerfile and a compose file for this site"
    )
    service.add_argument("--out", type=Path, metavar="DIR", help="default: SITE/service")
    service.set_defaults(command=_service)

    renew = commands.add_parser("renew", help="ask to be admitted for longer")
    renew.add_argument(
        "--new-node-key", action="store_true", help="with a new key for Flower's authentication"
    )
    renew.add_argument("--out", type=Path, metavar="FILE", help="default: SITE.renewal.json")
    renew.set_defaults(command=_renew, recorded="renew")


def _add_confirmation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fingerprint",
        action="append",
        default=[],
        metavar="SITE=F",
        help="a site's fingerprint as that hospital told you; once for each new site",
    )
    parser.add_argument(
        "--yes", action="store_true", help="I have compared every fingerprint that is shown"
    )


def _enrol(arguments: argparse.Namespace) -> int:
    folder, now = SiteFolder(arguments.site), time.time()
    data = read_bytes(arguments.invitation, "invitation")
    opened = enrolment.read_invitation(data, now)
    invitation, shown = opened.record, fingerprint(opened.signer)
    print(
        f"Project      {invitation.project}\nThis site    {invitation.site}\n"
        f"Server       {invitation.server}\nCoordinator  {shown}\n"
    )
    heard(shown, "the coordinator", arguments.fingerprint)
    out = arguments.out or Path(f"{invitation.site}.request.json")
    replace_file(out, enrolment.enrol(folder, data, now), mode=0o644)
    print(
        f"Keys made in {folder.path}; they stay there.\n\n"
        f"Send {out} to the coordinator, and read this by telephone:\n\n"
        f"  {folder.identity().fingerprint}\n\n"
        f"Meanwhile: say in {folder.settings_file} where the data are, and in "
        f"{folder.path / 'policy.toml'} what is allowed.\nNext: fedward-site join KIT"
    )
    return 0


def _join(arguments: argparse.Namespace) -> int:
    folder = SiteFolder(arguments.site)
    kit = enrolment.join(folder, read_bytes(arguments.kit, "kit"), time.time())
    print(f"Admitted to project {kit.project}, {kit.server}, until {day(kit.expires)}.\n")
    _write_service(folder, None)
    if len(kit.roster) < 2:
        print("No other site is admitted yet. Pin them later: fedward-site roster trust ROSTER")
        return 0
    return _pin(folder, kit.roster, kit.roster_serial, arguments)


def _service(arguments: argparse.Namespace) -> int:
    for file in _write_service(SiteFolder(arguments.site), arguments.out):
        print(file)
    return 0


def _write_service(folder: SiteFolder, out: Path | None) -> tuple[Path, ...]:
    name, project = folder.config().name, folder.project()
    service = Service(
        name="fedward-site",
        description=f"Fedward site {name} of project {project}",
        program=Path(sys.executable).parent / "fedward-site",
        words=("up",),
        folder=folder.path.resolve(),
        user=getpass.getuser(),
        variable="FEDWARD_SITE",
        port=None,
        version=fedward_version(),
    )
    return write_files(service, out or folder.path / "service")


def _trust(arguments: argparse.Namespace) -> int:
    folder = SiteFolder(arguments.site)
    file = arguments.roster or folder.kit_file
    data = read_bytes(file, "roster")
    if schema_of(data, str(file)) == ROSTER:
        roster = enrolment.read_roster(folder, data)
        return _pin(folder, roster.sites, roster.serial, arguments)
    kit = enrolment.open_kit(folder, data)
    return _pin(folder, kit.roster, kit.roster_serial, arguments)


def _pin(
    folder: SiteFolder, members: tuple[Member, ...], serial: int, arguments: argparse.Namespace
) -> int:
    changes = enrolment.changes(folder, members)
    for word, names in (("removed", changes.removed), ("as before", changes.kept)):
        if names:
            print(f"{word:<10} {', '.join(names)}")
    for word, sites in (("new", changes.added), ("CHANGED", changes.changed)):
        for site in sites:
            print(f"{word:<10} {site.name:<24} {fingerprint(site.public)}")
    if changes.changed:
        print("\nA site that changed its identity must be able to say why. Ask it, not the server.")
    _confirm(changes.to_compare, arguments)
    enrolment.pin(folder, members, serial)
    print(
        f"\n{len(members)} sites are pinned, this one included. For policy.toml:\n\n  roster = ["
        + ", ".join(f'"{fingerprint(m.public)}"' for m in members)
        + "]\n\nNext: fedward-site check"
    )
    return 0


def _confirm(sites: tuple[Member, ...], arguments: argparse.Namespace) -> None:
    told = _told(arguments.fingerprint)
    unknown = sorted(set(told) - {s.name for s in sites})
    if unknown:
        raise ConfigError(f"--fingerprint names {', '.join(unknown)}, which is no new site here.")
    if not sites:
        return
    print()
    if not told and not arguments.yes and not sys.stdin.isatty():
        raise ConfigError(
            "nobody is there to compare fingerprints, so no site was pinned. Ask each hospital for "
            "its own, and give them: fedward-site roster trust --fingerprint SITE=F ... "
            "(or --yes once all that is shown was compared)."
        )
    for site in sites:
        if arguments.yes and site.name not in told:
            continue
        if told and site.name not in told:
            raise ProtocolError(f"no --fingerprint for {site.name}; nothing was pinned.")
        heard(fingerprint(site.public), f"site {site.name}", told.get(site.name))


def _told(pairs: list[str]) -> dict[str, str]:
    told = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--fingerprint {pair!r}: write SITE=FINGERPRINT.")
        told[name] = value
    return told


def _show(arguments: argparse.Namespace) -> int:
    folder = SiteFolder(arguments.site)
    config, me = folder.config(), folder.identity()
    coordinator = folder.coordinator()
    print(f"{'coordinator':<24} {fingerprint(coordinator.public)}  {coordinator.project}")
    print(f"{config.name:<24} {me.fingerprint}  this site")
    if not folder.roster_file.exists():
        print("No other site is pinned: fedward-site roster trust ROSTER")
        return 0
    for name, public in folder.roster().items():
        if name != config.name:
            print(f"{name:<24} {fingerprint(public)}")
    return 0


def _renew(arguments: argparse.Namespace) -> int:
    folder = SiteFolder(arguments.site)
    data = enrolment.renew(folder, time.time(), new_node_key=arguments.new_node_key)
    out = arguments.out or Path(f"{folder.config().name}.renewal.json")
    replace_file(out, data, mode=0o644)
    print(
        f"Send {out} to the coordinator. It is signed by this site's "
        "identity, so nothing has to be read by telephone.\nNext: fedward-site join KIT"
    )
    return 0
