"""The files that keep a site or a server running: read by the tools that will read them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from shared.errors import ConfigError
from shared.service import CONTAINER_USER, Service, compose, dockerfile, systemd_unit, write_files

INSTRUCTIONS = {
    *("FROM", "ARG", "COPY", "RUN", "USER", "ENV", "VOLUME", "EXPOSE"),
    *("STOPSIGNAL", "ENTRYPOINT", "CMD"),
}


@pytest.fixture(params=["fedward-site", "fedward-server"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Service:
    server = request.param == "fedward-server"
    return Service(
        name=request.param,
        description="Fedward site north of project heart",
        program=Path(sys.executable),
        words=("up",),
        folder=tmp_path,
        user="root",
        variable="FEDWARD_PROJECT" if server else "FEDWARD_SITE",
        port=8443 if server else None,
        version="0.1.0",
    )


def lint(unit: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit_and_would_see_a_mistake(service: Service, tmp_path: Path) -> None:
    unit = next(f for f in write_files(service, tmp_path / "service") if f.suffix == ".service")
    found = lint(unit)
    assert found.stderr.strip() == ""
    assert found.returncode == 0
    unit.write_text(unit.read_text().replace("Restart=always", "Restrt=always"))
    assert "Restrt" in lint(unit).stderr


def test_the_unit_may_write_its_own_folder_and_nothing_else(service: Service) -> None:
    lines = systemd_unit(service).splitlines()
    assert [line for line in lines if line.startswith("ReadWritePaths")] == [
        f"ReadWritePaths={service.folder}"
    ]
    wanted = {"ProtectSystem=strict", "NoNewPrivileges=yes", "UMask=0077", "KillMode=mixed"}
    assert wanted <= set(lines)
    assert "RestartPreventExitStatus=2 3" in lines


def test_a_path_that_a_unit_would_misread_is_refused(service: Service) -> None:
    for bad in ("/srv/my site", "/srv/50%", "/srv/$HOME"):
        with pytest.raises(ConfigError, match="plain path"):
            systemd_unit(replace(service, folder=Path(bad)))


def test_compose_is_yaml_without_any_right_that_is_not_needed(service: Service) -> None:
    found = yaml.safe_load(compose(service))["services"][service.name]
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in found
    assert found["volumes"] == [f"{service.folder}:/{service.name}"]
    # A site is reached by nobody; a server on its one port.
    assert found.get("ports") == (["8443:8443"] if service.port else None)
    assert str(CONTAINER_USER) in found["user"]


def test_the_dockerfile_has_only_instructions_and_no_root(service: Service) -> None:
    text = dockerfile(service).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= INSTRUCTIONS
    assert lines[0].startswith("FROM ")
    assert lines.index("USER fedward") < len(lines) - 2
    assert lines[-2:] == [f'ENTRYPOINT ["{service.name}"]', 'CMD ["up"]']
    assert "curl" not in text
    assert "http" not in text
    assert ("EXPOSE 8443" in lines) == bool(service.port)
