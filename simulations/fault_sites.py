"""Faults of the matrix: a site that is not as it should be, or is none; see fault_list.py."""

from __future__ import annotations

import hashlib
import io
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from client.config import SiteFolder
from client.enrolment import make_node_key
from server.link import Link
from server.runs import new_run
from server.up import running_link
from shared.bundle import RUN_FOLDER, build_bundle, pack
from shared.supervise import environment, free_port
from simulations.deployment import Deployment, wait_for
from simulations.fault_play import VICTIM, NotHeldError, Play

REFUSED = "Nothing of it was unpacked"


def disk_full(play: Play) -> None:
    """The victim's worker can write nothing more, for one round."""
    play.begin()
    play.reach("agree")
    worker = play.live.site_pid(VICTIM, "worker")
    free = resource.prlimit(worker, resource.RLIMIT_FSIZE)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, free[1]))
    rounds = len(play.live.rounds())
    enough = lambda: len(play.live.rounds()) >= rounds + 2 or _over(play)  # noqa: E731
    wait_for("two rounds", enough, 200)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, free)
    play.end()


def _over(play: Play) -> bool:
    return play.live.status()["state"] in ("finished", "failed")


CLOCK = """\
import datetime, time
_time, _datetime = time.time, datetime.datetime
time.time = lambda: _time() + SHIFT * 86400
class Shifted(_datetime):
    @classmethod
    def now(cls, tz=None):
        return _datetime.now(tz) + datetime.timedelta(days=SHIFT)
datetime.datetime = Shifted
"""

OLDER = """\
import shared.messages
shared.messages.PROTOCOL_VERSION -= 1
"""


def clock_off(days: int) -> Callable[[Play], None]:
    """A site's clock is wrong by days; it is out until the clock is right again."""

    def strike(play: Play) -> None:
        play.begin()
        play.reach("round")
        play.restart_as(VICTIM, CLOCK.replace("SHIFT", str(days)))
        play.end()
        play.restart(VICTIM)

    return strike


def older_protocol(play: Play) -> None:
    """A site speaks an older version of the wire protocol."""
    play.restart_as(VICTIM, OLDER)
    wait_for("the site", lambda: VICTIM in play.live.online(), 120)
    play.begin()
    play.end()
    play.restart(VICTIM)


UNMASKED = """\
import client.secagg_round as round_
def without(vector, plus, minus, bits, source=None, **rest):
    if source is not None:
        source.reader(0)(vector)
        vector &= (1 << bits) - 1
round_.add_masks = without
"""


def nothing_in_the_clear(play: Play) -> None:
    """The control: sites that do not mask are found. Then a study that nothing disturbs."""
    for name in play.live.names:
        play.restart_as(name, UNMASKED)
    wait_for("all sites", lambda: play.live.online() == set(play.live.names), 300)
    play.begin()
    play.at("agree", 0)
    updates = play.replayed(everyone=True).updates
    control = play.in_the_clear(updates)
    play.abandon()
    if control != {"wire", "database"}:
        raise NotHeldError(f"the control, without masks, was found in {sorted(control)} only")
    for name in play.live.names:
        play.restart(name)
    wait_for("all sites", lambda: play.live.online() == set(play.live.names), 300)
    play.forget()
    play.begin()
    play.end()
    play.notes.append("not found; without masks found on the wire and in the database")


def call_as_stranger(live: Deployment, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """A SuperNode that has the project's CA and address, but a key that nobody registered.

    Args:
        live: A deployment that runs.
        folder: For the stranger's files; exists.
    """
    make_node_key(folder / "stranger")
    site = SiteFolder(live.site(live.names[0]))
    return subprocess.run(
        [
            *(sys.executable, "-P", "-m", "shared.child", "client.bundle:supernode"),
            *("--superlink", site.kit().server),
            *("--root-certificates", str(site.ca_certificate)),
            *("--auth-supernode-private-key", str(folder / "stranger")),
            *("--isolation", "process", "--port", str(free_port())),
        ],
        env=environment(folder / "home"),
        capture_output=True,
        timeout=300,
        check=False,
    )


def was_refused(call: subprocess.CompletedProcess[bytes]) -> bool:
    """Whether a SuperNode ended because the server did not let it in."""
    words = call.stdout + call.stderr
    return call.returncode != 0 and b"Failed to initialize the connection" in words


def stranger(play: Play) -> None:
    """In the middle of a study a SuperNode calls with a key that nobody registered."""
    play.begin()
    play.reach("round")
    call = call_as_stranger(play.live, Path(tempfile.mkdtemp(dir=play.live.base)))
    if not was_refused(call):
        raise NotHeldError(f"the stranger was not refused: {call.stderr[-300:]!r}")
    play.notes.append("the stranger was refused")
    play.end()


def offer_changed_bundle(live: Deployment, link: Link, added: bytes) -> None:
    """As `fedward-server run`, with another bundle: what a coordinator could do."""
    from flwr.common.serde import fab_to_proto, user_config_to_proto  # noqa: PLC0415
    from flwr.proto.control_pb2 import StartRunRequest  # noqa: PLC0415
    from flwr.supercore.fab import Fab  # noqa: PLC0415

    with zipfile.ZipFile(io.BytesIO(build_bundle())) as bundle:
        content = {name: bundle.read(name) for name in bundle.namelist() if name[0] != "."}
    content["client/app.py"] += added
    fab = pack(content)
    run = new_run(live.project, live.plan, 60.0, time.time())
    request = StartRunRequest(
        fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {})),
        override_config=user_config_to_proto({RUN_FOLDER: str(run.path)}),
    )
    if not link._client.StartRun(request).HasField("run_id"):
        raise NotHeldError("the SuperLink did not take the changed bundle")


def refusals_of_bundles(live: Deployment) -> dict[str, int]:
    """How often each site has refused a bundle, by its SuperNode's log."""
    logs = {name: live.site(name) / "logs" / "supernode.log" for name in live.names}
    return {name: log.read_text().count(REFUSED) for name, log in logs.items() if log.exists()}


def changed_bundle(play: Play) -> None:
    """A coordinator offers a bundle that is not the installed version's."""
    live = play.live
    before = refusals_of_bundles(live)
    left = live.base / "the-bundle-ran"
    live.approve()
    with running_link(live.project) as link:
        offer_changed_bundle(live, link, f"\nopen({str(left)!r}, 'w').close()\n".encode())
    wait_for("the refusal", lambda: live.status().get("state") == "failed", 400)
    refused = refusals_of_bundles(live)
    if not all(refused[name] > before.get(name, 0) for name in live.names):
        raise NotHeldError(f"refused by some sites only: {before} before, {refused} after")
    unpacked = [name for name in live.names if (live.site(name) / "flower" / "apps").exists()]
    if unpacked or left.exists():
        raise NotHeldError(f"the bundle was unpacked at {unpacked}, or ran: {left.exists()}")
    play.notes.append("refused by every site, nothing unpacked, nothing charged")
