"""The relay's side of the secure sum: routes, adds, unmasks; holds no key.

relay = Relay(session)
s1 = relay.advertised({name: member.advertise()})       # all sites' replies in, requests out
s2 = relay.encapsulated({name: member.encapsulate(s1[name])})
s3 = relay.dealt({name: member.prekeys(s2[name])})
s4 = relay.confirmed({name: member.confirm(s3[name])})  # then member.activate(s4[name])
r0 = relay.open_round(1, model_hash=..., cohort=...)
relay.add_masked(name, reply)                           # as they come
r2 = relay.close_inputs()                               # CohortError: abort
relay.add_agreement(name, reply)
r3 = relay.close_agreement()                            # {} when nobody dropped out
relay.add_release(name, reply)
total = relay.unmask(); result = relay.publish()        # or relay.abort("why")
packages = relay.recheck_packages()                     # member.check_chunks(packages[name])
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shared.secagg.session import Session

RingVector = npt.NDArray[np.uint32]


class Relay:
    def __init__(self, session: Session) -> None: ...

    def advertised(self, replies: Mapping[str, bytes]) -> dict[str, bytes]:
        raise NotImplementedError

    def encapsulated(self, replies: Mapping[str, bytes]) -> dict[str, bytes]:
        raise NotImplementedError

    def dealt(self, replies: Mapping[str, bytes]) -> dict[str, bytes]:
        raise NotImplementedError

    def confirmed(self, replies: Mapping[str, bytes]) -> dict[str, bytes]:
        raise NotImplementedError

    def open_round(
        self, round_no: int, *, model_hash: bytes, cohort: tuple[str, ...] | None = None
    ) -> dict[str, bytes]:
        """R0 for each site of the cohort (default: every site with prekeys for the round)."""
        raise NotImplementedError

    def add_masked(self, name: str, reply: bytes) -> None:
        """Add one site's R1; ProtocolError names the site when it is late, forged or malformed."""
        raise NotImplementedError

    def close_inputs(self) -> dict[str, bytes]:
        """R2 for each site of U3; CohortError when too few answered."""
        raise NotImplementedError

    def add_agreement(self, name: str, reply: bytes) -> None:
        raise NotImplementedError

    def close_agreement(self) -> dict[str, bytes]:
        """R3 for each site that signed, or {} when U3 is the whole cohort; CohortError."""
        raise NotImplementedError

    def add_release(self, name: str, reply: bytes) -> None:
        raise NotImplementedError

    def unmask(self) -> RingVector:
        """The sum over U3, uint32 (d,); CohortError, or ProtocolError that names a liar."""
        raise NotImplementedError

    def publish(self) -> bytes:
        """The Result for all sites (also those that were absent); ends the round."""
        raise NotImplementedError

    def abort(self, reason: str) -> bytes:
        """The Abort for all sites; ends the round."""
        raise NotImplementedError

    def recheck_packages(self) -> dict[str, bytes]:
        """For each site of the last U3 that has chunks to recheck, its package."""
        raise NotImplementedError

    @property
    def transcript(self) -> bytes:
        raise NotImplementedError

    @property
    def contributors(self) -> tuple[str, ...]:
        raise NotImplementedError

    def snapshot(self) -> bytes:
        """Everything, for a checkpoint: take it after open_round and after publish or abort,
        before their bytes leave."""
        raise NotImplementedError

    @classmethod
    def restore(cls, session: Session, data: bytes) -> Relay:
        raise NotImplementedError
