"""The faults of the matrix, in the order of its table; see simulations/fault_matrix.py."""

from __future__ import annotations

from simulations.fault_kills import (
    PHASES,
    kill_machine,
    kill_proxy,
    kill_serverapp,
    kill_site,
    kill_superlink,
)
from simulations.fault_network import (
    delayed,
    duplicated,
    expired,
    network,
    reordered,
    wrong,
)
from simulations.fault_play import Fault
from simulations.fault_sites import (
    changed_bundle,
    clock_off,
    disk_full,
    nothing_in_the_clear,
    older_protocol,
    stranger,
)

FAULTS: tuple[Fault, ...] = (
    *(kill_site(action) for action in PHASES),
    kill_superlink,
    kill_serverapp,
    kill_proxy,
    Fault("machine-killed-round", "the server's machine fails in `round`", kill_machine),
    Fault("network-cut", "a site's network is cut for 20 s, both ways", network(True, True)),
    Fault("requests-lost", "a site's requests are lost for 20 s", network(True, False)),
    Fault("replies-lost", "the replies to a site are lost for 20 s", network(False, True)),
    Fault("delays", "everything of a site takes 30 s longer for a while", delayed),
    Fault("duplicates", "every reply of a site arrives twice", duplicated),
    Fault("reordered", "every request is held back at random", reordered),
    wrong,
    expired,
    Fault("stranger", "a SuperNode calls with a stranger's key", stranger),
    Fault("changed-bundle", "the server offers a changed bundle", changed_bundle, ends="failed"),
    Fault("older-protocol", "a site speaks an older protocol", older_protocol, drops=True),
    Fault("disk-full", "a site can write nothing for two rounds", disk_full, drops=True),
    Fault("clock-ahead", "a site's clock is a day ahead", clock_off(1), drops=True),
    Fault("clock-behind", "a site's clock is a day behind", clock_off(-1), drops=True),
    Fault("in-the-clear", "somebody reads behind the TLS", nothing_in_the_clear),
)
