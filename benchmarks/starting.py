"""What `import fray` costs in a fresh interpreter, and what it loads."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.measuring import Comparison, Settings, Side, clock, compare, interleave, state
from benchmarks.peers import peer_python

__all__ = ["ROWS", "measure_import"]

_FORBIDDEN = ("pydantic", "pydantic_core", "rich", "typer", "click", "psutil", "platformdirs", "ray", "docker")


def measure_import(settings: Settings) -> list[Comparison]:
    """Start interpreters that import Fray, the standard-library modules that Fray imports, nothing, and TorchX."""
    needed, own = _modules_of("import fray")
    against = f"its {len(needed)} stdlib modules"
    sides = [
        Side("fray", lambda: _start(sys.executable, "import fray")),
        Side(against, lambda: _start(sys.executable, "import " + ", ".join(needed))),
        Side("bare interpreter", lambda: _start(sys.executable, "pass")),
    ]
    python, problem = peer_python(settings)
    if python:
        sides.append(Side("torchx.runner", lambda: _start(python, "import torchx.runner"), every=2))
    found = interleave("import", sides, settings.rounds(21), settings.seed)
    what = "import fray, fresh interpreter"
    first = compare("import", what, found["fray"], against, found[against], kind="ratio", bar=1.5)
    first.details["modules"] = needed
    bare = compare("import", what, found["fray"], "bare interpreter", found["bare interpreter"], kind="difference")
    lines = [first, bare]
    if python:
        lines.append(
            compare("import", what, found["fray"], "torchx.runner", found["torchx.runner"], kind="ratio", bar=1.0)
        )
    else:
        lines.append(Comparison("import", what, "torchx.runner", note=problem))
    unwanted = [name for name in needed if name.partition(".")[0] in _FORBIDDEN]
    unwanted += [name for name in own if name.startswith("fray.backend.")]
    clean = state("import", "backends, pydantic, typer, rich loaded by it", [float(len(unwanted))], bar=0, unit="count")
    clean.details["loaded"] = unwanted
    return [*lines, clean]


def _start(python: str, program: str) -> float:
    return clock(lambda: subprocess.run([python, "-c", program], check=True, stdin=subprocess.DEVNULL))


def _modules_of(program: str) -> tuple[list[str], list[str]]:
    """Return the modules that a program loads beyond a bare interpreter's, in order: others' and Fray's own."""
    ask = "import sys; names = list(sys.modules); import json; print(json.dumps(names))"
    bare = set(_ask(ask))
    loaded = [name for name in _ask(ask.replace("import sys;", f"{program}; import sys;", 1)) if name not in bare]
    own = [name for name in loaded if name == "fray" or name.startswith("fray.")]
    return [name for name in loaded if name not in own], own


def _ask(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    names: list[str] = json.loads(done.stdout)
    return names


ROWS = {"import": measure_import}
