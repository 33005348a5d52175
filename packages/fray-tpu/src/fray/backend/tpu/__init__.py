"""Cloud TPU slices, asked for in one line and never left running: the provisioner named `gcp-tpu`.

Google's client library is loaded when a provisioner first makes a call, not by importing this.
"""

from fray.backend.tpu._labels import label_value
from fray.backend.tpu._startup import RayJoin, startup_script
from fray.backend.tpu.interface import Clock, Doomed, GcPlan, GcReport, Provisioner, SystemClock
from fray.backend.tpu.provisioner import TpuProvisioner
from fray.backend.tpu.types import (
    DataDisk,
    Host,
    Lease,
    OnProgress,
    Progress,
    Slice,
    SliceChoice,
    SliceGroup,
    SliceRequest,
    SliceState,
    Tier,
)

__all__ = [
    "Clock",
    "DataDisk",
    "Doomed",
    "GcPlan",
    "GcReport",
    "Host",
    "Lease",
    "OnProgress",
    "Progress",
    "Provisioner",
    "RayJoin",
    "Slice",
    "SliceChoice",
    "SliceGroup",
    "SliceRequest",
    "SliceState",
    "SystemClock",
    "Tier",
    "TpuProvisioner",
    "label_value",
    "startup_script",
]
