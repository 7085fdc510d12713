"""How an operator's machine keeps a site or a server running: systemd unit, Dockerfile, compose.

Each side writes these files itself, from the software that it installed. They are never sent: a
Dockerfile from outside would be code from outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError
from shared.files import make_folder, replace_file

STOP_S = 60
"""Seconds that a stop may take: an answer under way is finished first."""
CONTAINER_USER = 10001


@dataclass(frozen=True)
class Service:
    """One thing to keep running.

    Attributes:
        name: Of the unit and of the container, such as "fedward-site".
        description: One line.
        program: Absolute path of the command.
        words: Its arguments on this machine.
        folder: The one folder that it may write.
        user: Of this machine.
        variable: Environment variable that names the folder.
        port: That the outside must reach; None where nothing has to.
        version: Of fedward.
    """

    name: str
    description: str
    program: Path
    words: tuple[str, ...]
    folder: Path
    user: str
    variable: str
    port: int | None
    version: str


def write_files(service: Service, target: Path) -> tuple[Path, ...]:
    """Write the three files into a folder, over older ones.

    Raises:
        ConfigError: a path holds characters that unit files cannot.
    """
    make_folder(target)
    files = {
        f"{service.name}.service": systemd_unit(service),
        "Dockerfile": dockerfile(service),
        "compose.yaml": compose(service),
    }
    for name, text in files.items():
        replace_file(target / name, text.encode(), mode=0o644)
    return tuple(target / name for name in files)


def systemd_unit(service: Service) -> str:
    """A unit that starts at boot, restarts, and may write its own folder only."""
    folder, program = _safe(service.folder), _safe(service.program)
    words = " ".join(_safe(Path(word)) for word in service.words)
    return f"""\
# systemctl link {folder}/service/{service.name}.service
# systemctl enable --now {service.name}
[Unit]
Description={service.description}
Wants=network-online.target time-sync.target
After=network-online.target time-sync.target

[Service]
Type=exec
User={service.user}
ExecStart={program} {words}
Environment={service.variable}={folder}
Restart=always
RestartSec=10
# Wrong settings (2) and refusals of the policy (3) need a person; all else is tried again.
RestartPreventExitStatus=2 3
KillMode=mixed
TimeoutStopSec={STOP_S}
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
PrivateDevices=no
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
LockPersonality=yes
CapabilityBoundingSet=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
ReadWritePaths={folder}

[Install]
WantedBy=multi-user.target
"""


def dockerfile(service: Service) -> str:
    """An image of the wheel that lies beside it; it runs as a user without rights."""
    wheel = f"fedward-{service.version}-py3-none-any.whl"
    exposed = f"EXPOSE {service.port}\n" if service.port else ""
    return f"""\
# Put {wheel} beside this file; it is built from the source that you reviewed: pip wheel --no-deps .
FROM python:3.12-slim
ARG WHEEL={wheel}
COPY ${{WHEEL}} /tmp/
RUN pip install --no-cache-dir "/tmp/${{WHEEL}}" \\
    && rm "/tmp/${{WHEEL}}" \\
    && useradd --create-home --uid {CONTAINER_USER} fedward
USER fedward
ENV {service.variable}=/{service.name}
VOLUME ["/{service.name}"]
{exposed}STOPSIGNAL SIGTERM
ENTRYPOINT ["{service.name}"]
CMD ["up"]
"""


def compose(service: Service) -> str:
    """One service, read-only but for its folder; `docker compose up -d` beside the Dockerfile."""
    folder = str(service.folder).replace('"', "")
    ports = f'    ports: ["{service.port}:{service.port}"]\n' if service.port else ""
    data = "" if service.port else "      # - /srv/export:/srv/export:ro  # the hospital's files\n"
    gpu = "" if service.port else _GPU
    return f"""\
services:
  {service.name}:
    build: .
    image: {service.name}:{service.version}
    command: ["up"]
    restart: unless-stopped
    stop_grace_period: {STOP_S}s
    # The owner of the folder below: id -u, id -g.
    user: "${{FEDWARD_UID:-{CONTAINER_USER}}}:${{FEDWARD_GID:-{CONTAINER_USER}}}"
    read_only: true
    tmpfs: ["/tmp"]
    cap_drop: ["ALL"]
    security_opt: ["no-new-privileges:true"]
{ports}    volumes:
      - "{folder}:/{service.name}"
{data}{gpu}"""


_GPU = """\
    # With a GPU (NVIDIA container toolkit):
    # deploy:
    #   resources:
    #     reservations:
    #       devices: [{driver: nvidia, count: 1, capabilities: [gpu]}]
"""


def _safe(path: Path) -> str:
    """A path as a unit file takes it without quotes."""
    text = str(path)
    if any(c.isspace() or c in "\"'\\%$;" for c in text):
        raise ConfigError(
            f"{text!r} has spaces or signs that a systemd unit cannot take. Choose a plain path."
        )
    return text
