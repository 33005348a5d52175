"""Check what is shipped: build the wheels, install them in an empty environment, and run pyright and import-linter.

The editable tree will not do for these two: an import package that is spread over distributions has a search path that
is computed, and they do not follow that.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"


def main(uv: str) -> int:
    """Return the exit code: 0 where all is well."""
    shutil.rmtree(BUILD, ignore_errors=True)
    wheels, environment = BUILD / "wheels", BUILD / "environment"
    for package in sorted(ROOT.glob("packages/*/pyproject.toml")):
        build = [uv, "build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable]
        subprocess.run([*build, "--out-dir", str(wheels), str(package.parent)], check=True)
    python = str(environment / "bin" / "python")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(environment)], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", python]
    subprocess.run([*install, "--require-hashes", "-r", "requirements/dev.txt"], cwd=ROOT, check=True)
    subprocess.run([*install, "--no-deps", *map(str, sorted(wheels.glob("*.whl")))], check=True)
    installed = next(environment.glob("lib/python*/site-packages/fray"))

    failed = []
    for name, command in {
        "pyright": [str(environment / "bin" / "pyright"), "--pythonpath", python, str(installed)],
        "import-linter": [str(environment / "bin" / "lint-imports"), "--config", "pyproject.toml"],
    }.items():
        variables = {**os.environ, "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        if subprocess.run(command, cwd=ROOT, env=variables).returncode:
            failed.append(name)
    if failed:
        print(f"not well: {', '.join(failed)}")
        return 1
    shutil.rmtree(BUILD)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
