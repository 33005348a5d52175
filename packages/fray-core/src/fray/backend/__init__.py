"""Where backends live: one module or package each, brought by distributions of their own."""

import pkgutil

__all__: list[str] = []

__path__ = pkgutil.extend_path(__path__, __name__)
del pkgutil
