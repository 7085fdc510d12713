"""The same steps, accounted again: by the auditor alone, by a finer PLD, by Opacus' PRV and RDP.

`epsilon` shares no code with the product; `account` holds the product's own number against others.

Three accountants that agree do not prove a guarantee, but a wrong formula, rate or composition in
one of them would show. PRV is the tightest independent one; RDP is always looser, by a known gap.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from opacus.accountants import RDPAccountant
from opacus.accountants.prv import PRVAccountant

from shared.privacy import PrivacyEvent, epsilon_of_events
from simulations.audits.checks import demand

Kinds = Mapping[tuple[float, float], int]
"""(noise multiplier, sample rate) -> steps."""

PRV_ERROR = 0.01
AGREEMENT = 0.02  # PLD against PRV without its error
RDP_GAP = (0.9999, 1.5)  # RDP over PLD: never below, and not far above where epsilon is not tiny
GRID = 1e-3
_FINE_GRID = 2.5e-4
_TINY = 0.5


@lru_cache(maxsize=256)
def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon of Poisson-sampled Gaussian steps, add or remove one, by loss distributions."""
    accountant = PLDAccountant(
        NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=GRID
    )
    step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
    accountant.compose(step, steps)
    return float(accountant.get_epsilon(delta))


@dataclass(frozen=True)
class Account:
    """Epsilon of the same steps by several accountants, at one delta.

    Attributes:
        pld: By the product's own function.
        fine: By PLD on a grid four times finer.
        prv: By Opacus' PRV accountant, its error included.
        rdp: By Opacus' RDP accountant.
    """

    delta: float
    pld: float
    fine: float
    prv: float
    rdp: float

    def text(self) -> str:
        """One line for a reader."""
        return (
            f"PLD {self.pld:.4f}, finer grid {self.fine:.4f}, PRV {self.prv:.4f}, "
            f"RDP {self.rdp:.4f} at delta {self.delta:g}"
        )


def account(kinds: Kinds, delta: float) -> Account:
    """Account for the steps in four ways; results are cached."""
    return _account(tuple(sorted((s, q, n) for (s, q), n in kinds.items() if n)), delta)


def check_agreement(found: Account) -> None:
    """Raise AuditError where the accountants differ by more than they are known to."""
    pld = found.pld
    demand(
        found.fine <= pld + 1e-9 and pld - found.fine <= 0.01 + 0.002 * pld,
        f"PLD on a finer grid disagrees: {found.text()}",
    )
    demand(
        abs(pld - (found.prv - PRV_ERROR)) <= AGREEMENT,
        f"PRV disagrees: {found.text()}",
    )
    low, high = RDP_GAP
    demand(
        low * pld <= found.rdp and (pld < _TINY or found.rdp <= high * pld),
        f"RDP disagrees: {found.text()}",
    )


@lru_cache(maxsize=256)
def _account(kinds: tuple[tuple[float, float, int], ...], delta: float) -> Account:
    if not kinds:
        return Account(delta, 0.0, 0.0, 0.0, 0.0)
    events = [PrivacyEvent(sigma, rate, steps) for sigma, rate, steps in kinds]
    fine = PLDAccountant(
        NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=_FINE_GRID
    )
    prv, rdp = PRVAccountant(), RDPAccountant()
    for sigma, rate, steps in kinds:
        one = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
        fine.compose(dp_event.SelfComposedDpEvent(one, steps))
        prv.history.append((sigma, rate, steps))
        rdp.history.append((sigma, rate, steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # RDP warns where its orders end; the gap is checked
        return Account(
            delta=delta,
            pld=epsilon_of_events(events, delta),
            fine=float(fine.get_epsilon(delta)),
            prv=float(prv.get_epsilon(delta, eps_error=PRV_ERROR, delta_error=delta / 1000)),
            rdp=float(rdp.get_epsilon(delta)),
        )
