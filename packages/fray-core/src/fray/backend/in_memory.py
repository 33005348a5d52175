"""The in-memory backend: tier 2 in threads of this process, for unit tests of tasks and actors."""

from fray._local_cluster import LocalClusterContext
from fray._local_job_context import LocalJobContext

__all__ = ["LocalClusterContext", "LocalJobContext"]
