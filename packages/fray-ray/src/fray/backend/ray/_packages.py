"""What is shipped with a job, as packages in the head's store, named by their content."""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import cache
from typing import NamedTuple

from fray.shipping import light_part

__all__ = ["Package", "fray_package", "make_package"]

_ENTRYPOINT = '''"""Runs a job of Fray's: `python3 -I -S fray_entrypoint.py COMMAND`."""

import os
import sys
import types

if __name__ == "__main__":
    # The packages above the one module that is needed are left empty: their own imports would take longer than the job
    # has to wait for anything else.
    here = os.path.dirname(os.path.abspath(__file__))
    for name in ("fray", "fray.backend", "fray.backend.ray"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [os.path.join(here, *name.split("."))]
    from fray.backend.ray._entrypoint import main

    main()
'''


class Package(NamedTuple):
    """A package that jobs refer to.

    Attributes:
        name: By its content, as Ray names its own.
        content: The archive.
    """

    name: str
    content: bytes

    @property
    def uri(self) -> str:
        """How a runtime environment refers to it."""
        return f"gcs://{self.name}"


def make_package(content: bytes) -> Package:
    """Return the package of an archive."""
    return Package(f"_ray_pkg_{hashlib.sha256(content).hexdigest()[:32]}.zip", content)


@cache
def fray_package() -> Package:
    """Return the part of Fray that each job is given: its light part, this backend, the program that starts the job."""
    files = {**light_part(("fray-core", "fray-ray")), "fray_entrypoint.py": _ENTRYPOINT.encode()}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            package.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return make_package(archive.getvalue())
