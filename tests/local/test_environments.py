"""Environments of local jobs: what is importable where, made once, never half-made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import fray
from fray.backend.local._interpreters import command_python
from fray.types import JobStatus, RuntimeEnv, TerminationReason
from fray.uv import find_uv, uv_environment
from tests.local.local_harness import LocalHarness
from tests.wheels import make_wheel


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def harness(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[LocalHarness]:
    """As elsewhere, with a cache of its own."""
    with LocalHarness(tmp_path_factory.mktemp("store"), cache) as harness:
        yield harness


def _uv(*arguments: str, cwd: Path | None = None) -> None:
    done = subprocess.run([find_uv(), *arguments], cwd=cwd, env=uv_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _output(harness: LocalHarness, command: str, env: RuntimeEnv | None = None) -> str:
    info = harness.run(command, env)
    assert info.status is JobStatus.SUCCEEDED, (info, harness.cluster.get_logs(info.id))
    return harness.cluster.get_logs(info.id)


def _environments(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


class TestOverlays:
    def test_a_job_imports_and_runs_what_it_asked_for(self, harness: LocalHarness, tmp_path: Path) -> None:
        env = RuntimeEnv([make_wheel(tmp_path, "tinypkg", "1.5")])
        assert _output(harness, "python -c 'import tinypkg; print(tinypkg.VERSION)'", env) == "1.5\n"
        assert _output(harness, "tinypkg-script", env) == "script of tinypkg 1.5\n"
        assert harness.run("python -c 'import tinypkg'").exit_code == 1
        assert harness.run("tinypkg-script").exit_code == 127

    def test_the_bases_packages_and_editable_installs_shine_through(
        self, harness: LocalHarness, tmp_path: Path
    ) -> None:
        base = tmp_path / "base env"
        _uv("venv", "--quiet", "--python", sys.executable, str(base))
        python = str(base / "bin" / "python")
        _uv("pip", "install", "--quiet", "--python", python, make_wheel(tmp_path / "w", "inbase", "1.0"))
        site = next(base.glob("lib/python*/site-packages"))
        (tmp_path / "src").mkdir()
        (tmp_path / "src" / "editable_one.py").write_text("HERE = True\n")
        (site / "editable.pth").write_text(f"{tmp_path / 'src'}\n")
        harness.options["python"] = python
        env = RuntimeEnv([make_wheel(tmp_path / "w", "ontop", "1.0")])
        show = "python -c 'import sys, inbase, ontop, editable_one; print(inbase.VERSION, ontop.VERSION)'"
        assert _output(harness, show, env) == "1.0 1.0\n"
        newer = RuntimeEnv([make_wheel(tmp_path / "w", "inbase", "2.0")])
        assert _output(harness, "python -c 'import inbase; print(inbase.VERSION)'", newer) == "2.0\n"
        assert _output(harness, "python -c 'import inbase; print(inbase.VERSION)'") == "1.0\n", "the base is as it was"

    def test_the_bases_versions_hold_unless_asked_otherwise(self, harness: LocalHarness, tmp_path: Path) -> None:
        links = tmp_path / "links"
        for version in ("1.0", "2.0"):
            make_wheel(links, "shared-dep", version)
        base = tmp_path / "base"
        _uv("venv", "--quiet", "--python", sys.executable, str(base))
        python = str(base / "bin" / "python")
        _uv("pip", "install", "--quiet", "--python", python, "--no-index", "-f", str(links), "shared-dep==1.0")
        harness.options["python"] = python
        env = RuntimeEnv(
            [make_wheel(tmp_path / "w", "needs-dep", requires=("shared-dep",))],
            env={"UV_FIND_LINKS": str(links), "UV_NO_INDEX": "1"},
        )
        show = "python -c 'import needs_dep, shared_dep; print(shared_dep.VERSION)'"
        assert _output(harness, show, env) == "1.0\n"
        asked = RuntimeEnv([*env.package_requirements, "shared-dep>=2"], env=env.env)
        assert _output(harness, show, asked) == "2.0\n"

    def test_what_determines_an_environment_is_in_its_name(
        self, harness: LocalHarness, tmp_path: Path, cache: Path
    ) -> None:
        first, second = (make_wheel(tmp_path / "w", name) for name in ("pkg-a", "pkg-b"))
        for _ in range(2):
            _output(harness, "true", RuntimeEnv([first, second]))
            _output(harness, "true", RuntimeEnv([second, first]))
        assert len(_environments(cache)) == 1
        _output(harness, "true", RuntimeEnv([first]))
        assert len(_environments(cache)) == 2
        _output(harness, "true", RuntimeEnv([first], env={"UV_INDEX_URL": "http://localhost:1/simple"}))
        assert len(_environments(cache)) == 3
        make_wheel(tmp_path / "w", "pkg-a", content="VERSION = 'changed'\n")
        show = "python -c 'import pkg_a; print(pkg_a.VERSION)'"
        assert _output(harness, show, RuntimeEnv([first])) == "changed\n", "the file behind the requirement changed"

    def test_a_failed_preparation_says_why_and_leaves_nothing(self, harness: LocalHarness, cache: Path) -> None:
        info = harness.run("echo ran", RuntimeEnv(["nothing-4f1c @ file:///nowhere/nothing_4f1c-1.0-py3-none-any.whl"]))
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.SETUP_FAILED)
        assert "nothing-4f1c" in info.message
        assert "/nowhere/nothing" in harness.cluster.get_logs(info.id)
        assert _environments(cache) == []

    def test_a_project_cannot_shadow_what_prepares_its_job(self, harness: LocalHarness, tmp_path: Path) -> None:
        project = tmp_path / "project"
        project.mkdir()
        for name in ("json.py", "fray.py", "psutil.py", "sitecustomize.py"):
            (project / name).write_text("raise SystemExit('shadowed')\n")
        env = RuntimeEnv(
            [make_wheel(tmp_path / "w", "tinypkg")], working_dir=str(project), env={"PYTHONPATH": str(project)}
        )
        assert _output(harness, "echo ran", env) == "ran\n"


class TestPreparation:
    def test_ten_jobs_at_once_prepare_one(self, harness: LocalHarness, tmp_path: Path, cache: Path) -> None:
        env = RuntimeEnv([make_wheel(tmp_path / "w", "tinypkg")])
        show = "python -c 'import tinypkg; print(tinypkg.__file__)'"
        ids = [harness.cluster.create_job(show, env) for _ in range(10)]
        assert {harness.end(job_id).status for job_id in ids} == {JobStatus.SUCCEEDED}
        assert len({harness.cluster.get_logs(job_id) for job_id in ids}) == 1
        assert len(_environments(cache)) == 1
        journals = b"".join((harness.job_directory(job_id) / "journal").read_bytes() for job_id in ids)
        assert journals.count(b"preparing the environment") == 1

    def test_a_killed_preparation_is_never_used(self, harness: LocalHarness, tmp_path: Path, cache: Path) -> None:
        # The wheel is a pipe that nobody writes to: uv blocks in the middle of the preparation.
        directory = tmp_path / "w"
        requirement = make_wheel(directory, "tinypkg")
        wheel = next(directory.iterdir())
        real = wheel.read_bytes()
        env = RuntimeEnv([requirement])
        key = harness.cluster.plan_job("true", env).native["environment"]["directory"]
        program = (
            f"import fcntl, signal; f = open({f'{key}.lock'!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print('held', flush=True); signal.pause()"
        )
        cache.mkdir(exist_ok=True)
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as rival:
            assert rival.stdout is not None
            assert rival.stdout.readline() == "held\n"
            half = Path(key).parent / f".{Path(key).name}-dead"
            (half / "bin").mkdir(parents=True)
            (half / "bin" / "python").write_text("#!/bin/sh\necho half made\n")
            job_id = harness.cluster.create_job("python -c 'import tinypkg; print(tinypkg.VERSION)'", env)
            harness.until(lambda: "another job" in harness.cluster.get_job(job_id).message, "it to wait for the other")
            rival.kill()
        assert harness.end(job_id).status is JobStatus.SUCCEEDED
        assert harness.cluster.get_logs(job_id) == "1.0\n"
        assert not half.exists(), "what a killed preparation left is removed"
        assert real == wheel.read_bytes()

    @pytest.mark.parametrize("seed", range(6))
    def test_preparations_killed_at_random_moments(
        self, harness: LocalHarness, tmp_path: Path, cache: Path, seed: int
    ) -> None:
        import random

        moment = random.Random(seed)
        env = RuntimeEnv([make_wheel(tmp_path / "w", f"tinypkg{seed}")])
        command = f"python -c 'import tinypkg{seed}; print(tinypkg{seed}.VERSION)'"
        doomed = harness.cluster.create_job(command, env)
        harness.until(lambda: harness._outcome(doomed).runner, "the preparation to begin")
        preparers: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            preparers.append(psutil.Process(harness._outcome(doomed).runner))
        steps = moment.randrange(1, 40)
        for _ in range(steps):  # a moment measured in work done, not in seconds
            if harness.cluster.get_job(doomed).start_time:
                break
        with suppress(psutil.NoSuchProcess):
            preparers += preparers[0].children(recursive=True) if preparers else []
        for process in preparers:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        info = harness.end(doomed)
        assert info.status is JobStatus.SUCCEEDED or info.reason in (
            TerminationReason.LOST,
            TerminationReason.SETUP_FAILED,
            TerminationReason.KILLED,
        )
        assert _output(harness, command, env) == "1.0\n"

    def test_a_job_stopped_while_it_is_prepared_never_runs(self, harness: LocalHarness, tmp_path: Path) -> None:
        env = RuntimeEnv([make_wheel(tmp_path / "w", "tinypkg")])
        for _ in range(3):
            job_id = harness.cluster.create_job("echo ran", env)
            harness.cluster.delete_job(job_id)
            info = harness.end(job_id)
            assert (info.status, info.attempts) == (JobStatus.STOPPED, ())
            assert harness.cluster.read_logs(job_id) == b""

    def test_secrets_and_large_secrets_pass_through_a_preparation(self, harness: LocalHarness, tmp_path: Path) -> None:
        secrets = {f"S{number}": chr(65 + number) * 100_000 for number in range(5)}
        env = RuntimeEnv([make_wheel(tmp_path / "w", "tinypkg")], secrets=secrets)
        for _ in range(2):
            assert _output(harness, "echo ${#S0} ${#S4}", env) == "100000 100000\n"


class TestProjects:
    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        project, wheels = tmp_path / "my project", tmp_path / "w"
        (project / "src" / "proj").mkdir(parents=True)
        (project / "src" / "proj" / "__init__.py").write_text("NAME = 'proj'\n")
        for name in ("always", "withgpu", "devonly"):
            make_wheel(wheels, name)
        (project / "pyproject.toml").write_text(
            f"""
[project]
name = "proj"
version = "0"
requires-python = ">=3.11"
dependencies = ["always"]
[project.optional-dependencies]
gpu = ["withgpu"]
[dependency-groups]
dev = ["devonly"]
[tool.uv]
package = false
[tool.uv.sources]
always = {{ path = "{wheels}/always-1.0-py3-none-any.whl" }}
withgpu = {{ path = "{wheels}/withgpu-1.0-py3-none-any.whl" }}
devonly = {{ path = "{wheels}/devonly-1.0-py3-none-any.whl" }}
"""
        )
        _uv("lock", "--quiet", "--python", sys.executable, cwd=project)
        return project

    def test_extras_install_what_the_lock_says(self, harness: LocalHarness, project: Path) -> None:
        env = RuntimeEnv(extras=["gpu"], working_dir=str(project))
        show = (
            "python -c 'import importlib.util as u; "
            'print([bool(u.find_spec(name)) for name in ("always", "withgpu", "devonly", "pytest", "fray")])\''
        )
        assert _output(harness, show, env) == "[True, True, False, False, True]\n", "isolated, and Fray is there"

    def test_the_lock_is_fixed_when_the_job_is_accepted(self, harness: LocalHarness, project: Path) -> None:
        with harness.hold_pending() as held:
            env = RuntimeEnv([], held.minimum_resources, extras=["gpu"], working_dir=str(project))
            job_id = harness.cluster.create_job("python -c 'import withgpu; print(withgpu.VERSION)'", env)
            (project / "uv.lock").write_text("changed since")
        assert harness.end(job_id).status is JobStatus.SUCCEEDED, harness.cluster.get_logs(job_id)

    def test_extras_that_cannot_be_are_refused_at_once(
        self, harness: LocalHarness, project: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "bare").mkdir()
        for directory, words in ((tmp_path / "bare", "uv lock"), (project, "nosuch")):
            with pytest.raises(fray.UsageError, match=words):
                harness.cluster.create_job("true", RuntimeEnv(extras=["nosuch"], working_dir=str(directory)))
        assert harness.cluster.list_jobs() == []


class TestInterpreters:
    def test_python_is_the_callers(self, harness: LocalHarness) -> None:
        for name in ("python", "python3"):
            show = f"{name} -c 'import sys; print(sys.executable)'"
            assert _output(harness, show) == f"{sys.executable}\n"

    def test_python_can_be_named(self, harness: LocalHarness, tmp_path: Path) -> None:
        named = tmp_path / "it's named"
        _uv("venv", "--quiet", "--python", sys.executable, str(named))
        harness.options["python"] = str(named / "bin" / "python")
        assert _output(harness, "python -c 'import sys; print(sys.prefix)'") == f"{named}\n"
        assert _output(harness, 'command -v activate.csh || ls "$(dirname "$(command -v python)")"').strip()

    def test_a_python_that_is_none_is_refused(self, harness: LocalHarness, tmp_path: Path) -> None:
        fake = tmp_path / "python"
        fake.write_text("#!/bin/sh\necho I am no Python\n")
        fake.chmod(0o755)
        for python, words in ((str(tmp_path / "missing"), "not there"), (str(fake), "does not answer")):
            cluster = fray.connect(harness.spec, **{**harness.options, "python": python})
            with pytest.raises(fray.UsageError, match=words):
                cluster.create_job("true", RuntimeEnv(["six"]))

    @pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
    def test_an_old_python_runs_and_only_the_context_is_refused(self, harness: LocalHarness, version: str) -> None:
        found = [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), shutil.which(f"python{version}")]
        # A version manager's stand-in may be on PATH for a Python that it does not have.
        runs = (path for path in found if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode)
        old = next((str(path) for path in runs), None)
        if old is None:
            pytest.skip(f"no Python {version} on this machine")
        harness.options["python"] = old
        assert _output(harness, "python -c 'import sys; print(sys.version_info[:2])'").startswith("(3, ")
        info = harness.run("python -c 'from fray import get_job_context'")
        assert info.exit_code == 1
        assert "needs Python 3.11 or newer" in harness.cluster.get_logs(info.id)

    def test_the_command_uses_the_users_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("venv", "project/.venv"):
            (tmp_path / name / "bin").mkdir(parents=True)
            (tmp_path / name / "bin" / "python").write_text("#!/bin/sh\n")
            (tmp_path / name / "bin" / "python").chmod(0o755)
        monkeypatch.chdir(tmp_path / "project")
        monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "venv"))
        assert command_python() == str(tmp_path / "venv" / "bin" / "python")
        monkeypatch.delenv("VIRTUAL_ENV")
        assert command_python() == str(tmp_path / "project" / ".venv" / "bin" / "python")
        monkeypatch.chdir(tmp_path)
        assert command_python() == shutil.which("python3")


def test_the_migration_pattern_runs(harness: LocalHarness, tmp_path: Path) -> None:
    (tmp_path / "my_job.py").write_text(
        "from fray import get_job_context\n\n"
        "ctx = get_job_context()\n"
        "ref = ctx.create_task(lambda: 42)\n"
        "print(ctx.get(ref))\n"
    )
    env = RuntimeEnv(working_dir=tmp_path)  # type: ignore[arg-type]
    assert _output(harness, "python my_job.py", env) == "42\n"


def test_clients_in_threads_share_one_context(harness: LocalHarness) -> None:
    codes: list[int | None] = []

    def submit(number: int) -> None:
        codes.append(harness.run(f"exit {number}").exit_code)

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(code for code in codes if code is not None) == list(range(8))
    assert os.getpid()
