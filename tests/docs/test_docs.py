"""The documentation is true: its code runs, its commands print what it shows, its links and lists are complete."""

from __future__ import annotations

import getpass
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

import fray
import fray.errors
from fray.cli import app
from fray.cluster import Capabilities
from fray.config import find_config
from fray.testing import ClusterHarness
from tests.docs.markdown import Block, anchors, blocks, headings, links, prose

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("packages/*/README.md")),
]
COMMAND_PAGE = ROOT / "docs" / "command.md"
DEADLINE_SECONDS = 240
# Where a page shows no such script of its own.
TRAIN = "import sys\nprint('training', *sys.argv[1:])\n"
_MARKER = "\x01"


def _id(page: Path) -> str:
    return str(page.relative_to(ROOT))


# What is shown runs


class Workplace:
    """A directory with the files that a page shows, and state, caches and installed distributions of its own."""

    def __init__(self, page: Path, directory: Path) -> None:
        self.page = page
        self.project = directory / "project"
        self.project.mkdir()
        self.site = directory / "site"
        self.site.mkdir()
        self.state = directory / "state"
        own_uv_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uv"
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("FRAY_", "VIRTUAL_ENV", "PYTEST_"))
        }
        self.environment = {
            "UV_CACHE_DIR": str(own_uv_cache),
            **kept,
            "XDG_STATE_HOME": str(self.state),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH")])),
            "COLUMNS": "120",
        }
        (self.project / "train.py").write_text(TRAIN)
        for block in blocks(page):
            if block.file_name and not block.is_exempt:
                path = self.project / block.file_name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
        for path in self.project.rglob("pyproject.toml"):
            self._install(path)

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a program; what it prints is in one stream, as on a terminal."""
        return subprocess.run(
            command,
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_SECONDS,
        )

    def _install(self, path: Path) -> None:
        """Make a project that a page shows an installed distribution, as pip would without an index."""
        project = tomllib.loads(path.read_text()).get("project")
        if not project:
            return
        info = self.site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = project.get("entry-points", {}).items()
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for package in (path.parent / "src").iterdir():
            (self.site / package.name).symlink_to(package)


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_what_a_page_shows_runs(page: Path, tmp_path: Path) -> None:
    workplace = Workplace(page, tmp_path)
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, block.place, "exec")
        if block.is_exempt:
            continue
        if block.language == "python":
            _run_python(workplace, block)
        elif block.language == "console":
            _run_console(workplace, block)
        elif block.language == "toml":
            tomllib.loads(block.text)


def _run_python(workplace: Workplace, block: Block) -> None:
    name = block.file_name
    if name is not None and "/" in name:
        return  # a module of a project: what uses it is shown too
    if name is None:
        name = f"block_{block.line}.py"
        (workplace.project / name).write_text(block.text)
    program = ["-m", "pytest", "-q", "-p", "no:cacheprovider", name] if name.startswith("test_") else [name]
    done = workplace.run([sys.executable, *program])
    assert done.returncode == 0, f"{block.place}:\n{done.stdout}"


def _run_console(workplace: Workplace, block: Block) -> None:
    """Run a block's commands in one shell and compare what each prints; one that fails shows that by `echo $?`."""
    shown: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            shown.append((line[2:], []))
        else:
            assert shown, f"{block.place}: output before any command"
            shown[-1][1].append(line)
    script = "".join(f"printf '{_MARKER}'; (exit $last)\n{command}\nlast=$?\n" for command, _ in shown)
    script += f"printf '{_MARKER}%s' $last"
    done = workplace.run(["bash", "-c", script])
    *printed, code = done.stdout.split(_MARKER)[1:]
    if not any(output for _, output in shown):
        assert code == "0", f"{block.place}:\n{done.stdout}"
        return
    for (command, expected), actual in zip(shown, printed, strict=True):
        wanted = _normalized(expected)
        got = _normalized(_anonymous(actual, workplace).splitlines())
        assert _matches(wanted, got), f"{block.place}: `{command}` printed\n{actual}\nand not\n" + "\n".join(expected)


def _anonymous(text: str, workplace: Workplace) -> str:
    """Put the page's user and directories in the place of this machine's."""
    text = text.replace(str(workplace.project.resolve()), "/home/ada/project")
    text = text.replace(str(workplace.project), "/home/ada/project")
    owner = f"{os.environ.get('USER') or ''}@{platform.node()}"
    return text.replace(f"{getpass.getuser()}@{platform.node()}", "ada@laptop").replace(owner, "ada@laptop")


def _normalized(lines: list[str]) -> list[str]:
    """Leave out what differs from run to run, progress above all: how much of it is seen is a matter of speed."""
    return [_without_chance(line) for line in lines if not re.match(r"fray: \S+ (PENDING|RUNNING): ", line)]


def _without_chance(line: str) -> str:
    """Put words in the place of made-up ids, moments and durations."""
    line = re.sub(r"\b(fray|sweep|digits)-\d{19}\b", r"\1-ID", line)
    line = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d([+-]\d\d:\d\d|Z)", "MOMENT", line)
    line = re.sub(r"\b\d+(\.\d+)?s\b|\b\d+m\d\ds\b", "DURATION", line)
    line = re.sub(r"^\.+ +\[100%\]$", "DOTS", line)
    return re.sub(r" +", " ", line).rstrip()


def _matches(wanted: list[str], got: list[str]) -> bool:
    """Whether the lines are as shown; an ellipsis stands for anything in its line, alone on one for any lines."""
    if not wanted:
        return not got
    if wanted[0] == "…":
        return any(_matches(wanted[1:], got[skipped:]) for skipped in range(len(got) + 1))
    pattern = ".*".join(re.escape(part) for part in wanted[0].split("…"))
    return bool(got) and re.fullmatch(pattern, got[0]) is not None and _matches(wanted[1:], got[1:])


def test_the_configurations_shown_are_valid(tmp_path: Path) -> None:
    checked = []
    for page in PAGES:
        for block in blocks(page):
            if block.file_name in ("pyproject.toml", "fray.toml"):
                directory = tmp_path / f"{page.stem}-{block.line}"
                directory.mkdir()
                (directory / block.file_name).write_text(block.text)
                config = find_config(directory)
                assert config.path == directory / block.file_name
                assert config.default in config.clusters
                checked.append(block.file_name)
    assert set(checked) == {"pyproject.toml", "fray.toml"}


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_languages_are_those_that_are_tested(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= {"python", "console", "toml", ""}


# What is linked is there


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("examples/*/README.md"))], ids=_id)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not path.startswith("/"), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}; there are {sorted(anchors(target))}"


def test_every_page_is_in_the_index() -> None:
    linked = {link.partition("#")[0] for link in links(ROOT / "docs" / "index.md")}
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"} <= linked


# What is listed is complete


def _commands() -> dict[str, typer.core.TyperCommand]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_every_command_is_documented_and_exists() -> None:
    documented = re.findall(r"^`fray ([\w-]+)`$", "\n".join(headings(COMMAND_PAGE)), re.MULTILINE)
    assert sorted(documented) == sorted(_commands())


def test_every_option_is_documented_and_exists() -> None:
    documented = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", prose(COMMAND_PAGE)))
    existing = {"--version", "--install-completion", "--show-completion", "--help"}
    for command in _commands().values():
        existing |= {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    assert documented == existing


def test_every_short_option_is_documented() -> None:
    page = prose(COMMAND_PAGE)
    for name, command in _commands().items():
        for parameter in command.params:
            short = [each for each in parameter.opts if re.fullmatch("-[a-z]", each)]
            long = [each for each in parameter.opts if each.startswith("--")]
            for each in short:
                assert f"`{each}`, `{long[0]}" in page, f"fray {name} {each}"


def test_every_exit_code_is_documented() -> None:
    from fray.cli import _errors

    table = prose(COMMAND_PAGE).partition("## Exit codes")[2].partition("\n## ")[0]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    existing = {value for name, value in vars(_errors).items() if name.startswith("EXIT_") and isinstance(value, int)}
    assert documented == existing | {0}


def test_every_public_name_is_documented() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in fray.__all__ if not re.search(rf"`(fray\.)?{name}\b", text)] == []


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("errors.md", fray.errors.__all__),
        ("jobs.md", [*fray.JobStatus, *fray.TerminationReason]),
        ("jobs.md", fray.RuntimeEnv.__dataclass_fields__),
        ("jobs.md", fray.JobInfo.__dataclass_fields__),
        ("jobs.md", [name for name in vars(fray.ClusterContext) if re.match("[a-z]+_jobs?$|[a-z]+_logs$|wait$", name)]),
        ("tasks-and-actors.md", fray.JobContext.__abstractmethods__),
        ("writing-a-backend.md", fray.ClusterContext.__abstractmethods__),
        ("writing-a-backend.md", Capabilities.__dataclass_fields__),
        ("writing-a-backend.md", ClusterHarness.__annotations__),
        ("writing-a-backend.md", ClusterHarness.__abstractmethods__),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lists_are_complete(page: str, names: list[str]) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert [name for name in names if not re.search(rf"(?<!\w){name}(?!\w)", text)] == []


def test_the_contract_has_its_fifteen_rules_and_the_suite_cites_no_other() -> None:
    from fray.testing import ClusterConformance

    rules = [int(number) for number in re.findall(r"^### (\d+)\. ", prose(ROOT / "docs" / "contract.md"), re.MULTILINE)]
    assert rules == list(range(1, 16))
    assert {check.rule for check in vars(ClusterConformance).values() if hasattr(check, "rule")} == set(rules)


def test_only_planned_distributions_are_called_planned() -> None:
    """A distribution that comes to be has to be described as one that is there."""
    table = prose(ROOT / "README.md").partition("## What exists today")[2]
    there = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}
    assert set(re.findall(r"^\| `(fray-\w+)` .*\| works", table, re.MULTILINE)) == there
