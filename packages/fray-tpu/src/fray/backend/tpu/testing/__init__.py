"""A stand-in for Google's side, for tests of code that provisions TPUs: no account, no money, no waiting."""

from fray.backend.tpu.testing._clock import ImpatientClock, VirtualClock
from fray.backend.tpu.testing._faults import Ending, Fault, Moment, Supply
from fray.backend.tpu.testing._machines import Machine, Machines
from fray.backend.tpu.testing._server import FakeCloud
from fray.backend.tpu.testing._world import JournalEntry

__all__ = [
    "Ending",
    "FakeCloud",
    "Fault",
    "ImpatientClock",
    "JournalEntry",
    "Machine",
    "Machines",
    "Moment",
    "Supply",
    "VirtualClock",
]
