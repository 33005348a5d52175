"""Jobs as containers, and the images that they run in: the backend named `docker`.

`images` builds images, for jobs and for any other use; it is not imported here, and neither is docker-py.
"""

from fray.backend.docker.cluster import DockerClusterContext, Mount

__all__ = ["DockerClusterContext", "Mount"]
