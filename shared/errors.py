"""One exception tree; the class says who must act, the message says how.

FedwardError                    exit 1  a bug of ours, or the machine
├── ConfigError                 exit 2  the operator: a file, a flag, a column
├── PolicyError                 exit 3  this site's officer: a limit was reached
│   └── SensitivityError        exit 3  the model, loss or layout breaks the privacy guarantee
├── ProtocolError               exit 4  the other side: a bad, missing or late message
│   └── CohortError             exit 4  too few sites answered
└── AuditError                  exit 5  a claim did not hold

A message is one readable paragraph: the fact, the limit, the way out. It never holds a secret,
a tensor or a patient's value.
"""

from __future__ import annotations


class FedwardError(Exception):
    """Root of every error that Fedward raises on purpose."""

    exit_code = 1


class ConfigError(FedwardError):
    """A file, flag, plan or dataset is not usable as given; the operator must change it."""

    exit_code = 2


class PolicyError(FedwardError):
    """This site does not allow what was asked; its officer decides."""

    exit_code = 3


class SensitivityError(PolicyError):
    """Removing one patient moves the pre-noise sum by more than the clip norm."""


class ProtocolError(FedwardError):
    """The other side sent something malformed, forged, stale or inconsistent."""

    exit_code = 4


class CohortError(ProtocolError):
    """Fewer sites answered than the plan's threshold."""


class AuditError(FedwardError):
    """An audited claim does not hold."""

    exit_code = 5
