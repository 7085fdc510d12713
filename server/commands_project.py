"""project: who takes part, from an invitation to a revocation."""

from __future__ import annotations

import argparse
import getpass
import sys
import time
from pathlib import Path

from server import provision
from server.project import Project, ProjectSettings, ProjectSite
from shared.command import Commands, heard
from shared.files import read_bytes, replace_file
from shared.identity import fingerprint
from shared.kit import address, day
from shared.service import Service, write_files
from shared.version import fedward_version

PORT = 8443


def add_commands(commands: Commands) -> None:
    """Add this file's commands to fedward-server."""
    project = commands.add_parser(
        "project",
        help="begin a project, invite sites, admit them, keep them out",
        description="Private keys never move: a site makes its own and sends a request with the "
        "public ones; the answer is a signed kit. Fingerprints are read over the telephone.",
    )
    actions = project.add_subparsers(required=True, metavar="ACTION")
    _add_init(actions)
    _add_admission(actions)
    _add_ends(actions)
    roster = actions.add_parser("roster", help="the signed list of sites, and its fingerprints")
    roster.add_argument("--out", type=Path, metavar="FILE", help="write it there, to be sent")
    roster.set_defaults(command=_roster)
    service = actions.add_parser(
        "service", help="write a systemd unit, a Dockerfile and a compose file for the server"
    )
    service.add_argument("--out", type=Path, metavar="DIR", help="default: PROJECT/service")
    service.set_defaults(command=_service)
    listing = actions.add_parser("list", help="every site, its state, until when")
    listing.set_defaults(command=_list)


def _add_init(actions: Commands) -> None:
    init = actions.add_parser("init", help="begin a project in a new folder")
    init.add_argument("folder", type=Path, metavar="DIR")
    init.add_argument("--name", help="of the project: a-z, 0-9, hyphens (default: the folder's)")
    init.add_argument(
        "--advertise",
        required=True,
        metavar="HOST:PORT",
        help="by which sites reach the server, through whatever NAT there is",
    )
    init.add_argument(
        "--bind", metavar="HOST:PORT", help="on which it listens (default: 0.0.0.0, same port)"
    )
    init.add_argument(
        "--expires", metavar="DATE", help="the project's last day (default: two years from now)"
    )
    init.set_defaults(command=_init)


def _add_admission(actions: Commands) -> None:
    invite = actions.add_parser("invite", help="write an invitation for a site")
    invite.add_argument("site", help="the name it will have in plans: a-z, 0-9, hyphens")
    invite.add_argument("--out", type=Path, metavar="FILE", help="default: SITE.invitation.json")
    invite.set_defaults(command=_invite)

    approve = actions.add_parser(
        "approve",
        help="admit a site by its request",
        description="Shows the fingerprint in the request and asks for what the site reads to you "
        "over the telephone. Call a number that you know, not one from the e-mail.",
    )
    approve.add_argument("request", type=Path, help="the file that the site sent")
    approve.add_argument("--fingerprint", metavar="F", help="as the site read it, whole")
    approve.set_defaults(command=_approve)

    kit = actions.add_parser("kit", help="write what an admitted site needs, to be sent to it")
    kit.add_argument("site")
    kit.add_argument("--out", type=Path, metavar="FILE", help="default: SITE.kit.json")
    kit.set_defaults(command=_kit)


def _add_ends(actions: Commands) -> None:
    renew = actions.add_parser(
        "renew", help="admit a site for longer; without a request, renew the server's certificate"
    )
    renew.add_argument("request", type=Path, nargs="?", help="from `fedward-site renew`")
    renew.add_argument("--out", type=Path, metavar="FILE", help="default: SITE.kit.json")
    renew.set_defaults(command=_renew)

    revoke = actions.add_parser("revoke", help="keep a site out from now on")
    revoke.add_argument("site")
    revoke.add_argument("--reason", default="", help="for revoked.json")
    revoke.set_defaults(command=_revoke)


def _init(arguments: argparse.Namespace) -> int:
    folder, now = arguments.folder, time.time()
    major, minor = fedward_version().split(".")[:2]
    settings = ProjectSettings(
        schema="fedward-project/1",
        name=arguments.name or folder.resolve().name,
        advertise=arguments.advertise,
        bind=arguments.bind or f"0.0.0.0:{address(arguments.advertise).port}",
        expires=arguments.expires or day(now + 2 * 365 * 24 * 3600),
        requires_fedward=f">={major}.{minor},<{major}.{int(minor) + 1}",
    )
    project = provision.init(folder, settings, now)
    _write_service(project, None)
    print(
        f"Project {settings.name!r} in {folder}, until {settings.expires}.\n"
        f"Sites reach {settings.advertise}; the server listens on {settings.bind}.\n"
        f"Fingerprint of the coordinator, to be read to every site over the telephone:\n\n"
        f"  {project.identity().fingerprint}\n\n"
        f"Back up {folder / 'ca'} and {folder / 'server'} where nobody else can read them.\n"
        f"Next: fedward-server project invite SITE --project {folder}"
    )
    return 0


def _service(arguments: argparse.Namespace) -> int:
    for file in _write_service(Project(arguments.project), arguments.out):
        print(file)
    return 0


def _write_service(project: Project, out: Path | None) -> tuple[Path, ...]:
    settings, folder = project.settings(), project.path.resolve()
    service = Service(
        name="fedward-server",
        description=f"Fedward server of project {settings.name}",
        program=Path(sys.executable).parent / "fedward-server",
        words=("up", "--project", str(folder)),
        folder=folder,
        user=getpass.getuser(),
        variable="FEDWARD_PROJECT",
        port=project.bind.port,
        version=fedward_version(),
    )
    return write_files(service, out or project.path / "service")


def _invite(arguments: argparse.Namespace) -> int:
    project = Project(arguments.project)
    data = provision.invite(project, arguments.site, time.time())
    file = arguments.out or Path(f"{arguments.site}.invitation.json")
    replace_file(file, data)
    invitation = project.invitation(arguments.site)
    print(
        f"{file} is for {arguments.site}, for one use, until "
        f"{day(invitation.expires) if invitation else '?'}.\n"
        f"Send it, and read them this by telephone: {project.identity().fingerprint}\n"
        f"There: fedward-site enrol {file.name}"
    )
    return 0


def _approve(arguments: argparse.Namespace) -> int:
    project, now = Project(arguments.project), time.time()
    data = read_bytes(arguments.request, "request")
    request = provision.examine(project, data, now)
    shown = fingerprint(bytes.fromhex(request.identity))
    print(f"Site         {request.site}\nfedward      {request.fedward}\nfingerprint  {shown}\n")
    heard(shown, f"site {request.site}", arguments.fingerprint)
    kit = provision.approve(project, data, now)
    waiting = [s.name for s in project.sites(now) if s.state == "invited"]
    print(f"Admitted until {day(kit.expires)}.")
    if waiting:
        print(f"Still to answer: {', '.join(waiting)}. Kits name the sites admitted by then.")
    print(f"Next: fedward-server project kit {request.site}")
    return 0


def _kit(arguments: argparse.Namespace) -> int:
    project = Project(arguments.project)
    kit = provision.refresh_kit(project, arguments.site, time.time())
    return _hand_out(project, arguments.site, arguments.out, len(kit.roster))


def _hand_out(project: Project, site: str, out: Path | None, sites: int) -> int:
    file = out or Path(f"{site}.kit.json")
    data = read_bytes(project.site_folder(site) / "kit.json", "kit")
    replace_file(file, data, mode=0o644)
    print(
        f"{file}: admits {site}, and names {sites} site(s). It holds no secret.\n"
        f"There: fedward-site join {file.name}"
    )
    return 0


def _renew(arguments: argparse.Namespace) -> int:
    project, now = Project(arguments.project), time.time()
    if arguments.request is None:
        ends = provision.renew_server_certificate(project, now)
        print(
            f"The server's certificate holds until {ends:%Y-%m-%d}. Restart the server to use it; "
            "sites need nothing."
        )
        return 0
    kit = provision.renew(project, read_bytes(arguments.request, "request"), now)
    print(f"{kit.site} is admitted until {day(kit.expires)}.")
    return _hand_out(project, kit.site, arguments.out, len(kit.roster))


def _revoke(arguments: argparse.Namespace) -> int:
    project = Project(arguments.project)
    entry = provision.revoke(project, arguments.site, arguments.reason, time.time())
    print(
        f"{entry.name} ({fingerprint(bytes.fromhex(entry.identity))}) is out: of the roster, and "
        "of the next cohort. A running server refuses its node key from now on.\n"
        "Send the new roster to the other sites: fedward-server project roster --out roster.json"
    )
    return 0


def _roster(arguments: argparse.Namespace) -> int:
    project = Project(arguments.project)
    roster = provision.write_roster(project, time.time())
    print(f"Roster {roster.serial} of project {roster.project}:")
    for site in roster.sites:
        print(f"  {site.name:<24} {fingerprint(site.public)}")
    for site in roster.revoked:
        print(f"  {site.name:<24} {fingerprint(site.public)}  revoked")
    if not roster.sites and not roster.revoked:
        print("  nobody yet")
    if arguments.out is not None:
        replace_file(arguments.out, read_bytes(project.roster_file, "roster"), mode=0o644)
        print(f"{arguments.out} is for every site: fedward-site roster trust {arguments.out.name}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    project, now = Project(arguments.project), time.time()
    settings = project.settings()
    print(
        f"Project {settings.name}, {settings.advertise}, until {settings.expires}; "
        f"coordinator {project.identity().fingerprint}\n"
    )
    sites = project.sites(now)
    if not sites:
        print("No site yet: fedward-server project invite SITE")
    for site in sites:
        print(_line(site))
    return 0


def _line(site: ProjectSite) -> str:
    key = fingerprint(site.identity) if site.identity else "-"
    word = {"revoked": "since", "expired": "since"}.get(site.state, "until")
    return f"  {site.name:<24} {site.state:<8} {word} {day(site.expires)}  {key}"
