"""The commands about the installation: `backends` and `doctor`."""

from __future__ import annotations

from dataclasses import asdict

from fray import plugins
from fray.cli._doctor import Check, examine
from fray.cli._errors import EXIT_FAILURE
from fray.cli._options import Shared, takes
from fray.cli._output import print_json, print_lines, print_table

__all__ = ["backends", "doctor"]


@takes()
def backends(shared: Shared) -> None:
    """List the backends, installed or not."""
    installed = plugins.list_plugins()
    there = {plugin.name for plugin in installed}
    missing = [
        (name, distribution)
        for (group, name), distribution in plugins._FIRST_PARTY.items()
        if group == plugins.BACKENDS and name not in there
    ]
    if shared.as_json:
        print_json(
            [{**asdict(plugin), "installed": True} for plugin in installed]
            + [{"name": name, "installed": False, "install": f"pip install {dist}"} for name, dist in missing]
        )
        return
    print_table(
        ("NAME", "INSTALLED"),
        [(plugin.name, plugin.distribution) for plugin in installed]
        + [(name, f"no: pip install {distribution}") for name, distribution in missing],
    )


@takes()
def doctor(shared: Shared) -> int:
    """Find what is wrong here and how to fix it.

    Looks at what is installed, configured and reachable.
    """
    checks: list[Check] = []
    for check in examine(shared.cluster):
        checks.append(check)
        if not shared.as_json:
            print_lines(_lines(check))
    problems = sum(not check.ok for check in checks)
    if shared.as_json:
        print_json({"ok": not problems, "checks": [asdict(check) for check in checks]})
    else:
        found = {0: "no problem found", 1: "1 problem found"}.get(problems, f"{problems} problems found")
        print_lines(["", found])
    return EXIT_FAILURE if problems else 0


def _lines(check: Check) -> list[str]:
    if check.ok:
        return [f"ok    {check.what}"]
    return [f"FAIL  {check.what}", f"      fix: {check.remedy}"]
