"""Fray: one job API from a laptop to a TPU pod.

`fray.connect` reaches a cluster, whose jobs are shell commands; inside a job `fray.get_job_context` gives tasks and
actors. Importing this loads the standard library only, and no backend.
"""

import pkgutil
import sys

# A job's command may use any Python: it is told why, rather than shown a syntax error.
if sys.version_info < (3, 11):  # noqa: UP036
    raise ImportError(
        "fray (and so get_job_context()) needs Python 3.11 or newer, and this is Python "
        + ".".join(map(str, sys.version_info[:3]))
        + " at "
        + sys.executable
    )

from fray._local_cluster import LocalClusterContext
from fray._local_job_context import LocalJobContext
from fray.cluster import Capabilities, ClusterContext, JobPlan
from fray.context import clear_job_context, get_job_context, set_job_context, use_job_context
from fray.errors import (
    FrayError,
    JobExistsError,
    JobFailedError,
    JobNotFoundError,
    PlatformError,
    UnsupportedError,
    UsageError,
    WaitTimeoutError,
)
from fray.job import JobContext, TpuContext
from fray.plugins import connect
from fray.types import (
    ActorOptions,
    Attempt,
    JobInfo,
    JobStatus,
    Lifetime,
    Resource,
    RuntimeEnv,
    TaskOptions,
    TerminationReason,
    TpuRunConfig,
)

__all__ = [
    "ActorOptions",
    "Attempt",
    "Capabilities",
    "ClusterContext",
    "FrayError",
    "JobContext",
    "JobExistsError",
    "JobFailedError",
    "JobInfo",
    "JobNotFoundError",
    "JobPlan",
    "JobStatus",
    "Lifetime",
    "LocalClusterContext",
    "LocalJobContext",
    "PlatformError",
    "Resource",
    "RuntimeEnv",
    "TaskOptions",
    "TerminationReason",
    "TpuContext",
    "TpuRunConfig",
    "UnsupportedError",
    "UsageError",
    "WaitTimeoutError",
    "clear_job_context",
    "connect",
    "get_job_context",
    "set_job_context",
    "use_job_context",
]

__path__ = pkgutil.extend_path(__path__, __name__)
del pkgutil, sys
