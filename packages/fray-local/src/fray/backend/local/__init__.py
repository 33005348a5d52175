"""Jobs as local subprocesses that outlive the client: the backend named `local`."""

from fray.backend.local.cluster import SubprocessClusterContext

__all__ = ["SubprocessClusterContext"]
