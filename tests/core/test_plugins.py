"""Discovery: real distributions' metadata, found, named, isolated from each other."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fray
from fray import plugins
from fray.config import find_config
from fray.errors import BackendNotFoundError, InvalidValueError


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory that stands for another site-packages."""
    directory = tmp_path / "site"
    directory.mkdir()
    return directory


def add_distribution(site: Path, name: str, entry_points: str, modules: dict[str, str]) -> None:
    """Write what pip would leave of a distribution."""
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
    for module, source in modules.items():
        (site / f"{module}.py").write_text(textwrap.dedent(source))


def run(site: Path, program: str, **variables: str) -> str:
    """Run a program that sees the distributions in `site` too."""
    environment = {**os.environ, "PYTHONPATH": str(site), **variables}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


THIN = """
    from fray.backend.local import SubprocessClusterContext

    class Thin(SubprocessClusterContext):
        name = "thin"
"""


def test_a_third_partys_backend_is_found_and_runs_jobs(site: Path, tmp_path: Path) -> None:
    add_distribution(site, "fray-thin", "[fray.backends]\nthin = thin_backend:Thin\n", {"thin_backend": THIN})
    program = f"""
    import sys, fray
    with fray.connect("thin:{tmp_path}/store") as cluster:
        assert cluster.spec == "thin:{tmp_path}/store"
        job_id = cluster.create_job("python -c 'import fray; print(fray.connect().spec)'")
        print(cluster.wait(job_id, 60).status, cluster.get_logs(job_id))
    """
    assert run(site, program) == f"SUCCEEDED thin:{tmp_path}/store"


@pytest.mark.timeout(900)
def test_a_third_partys_backend_runs_the_conformance_suite(site: Path, tmp_path: Path) -> None:
    add_distribution(site, "fray-thin", "[fray.backends]\nthin = thin_backend:Thin\n", {"thin_backend": THIN})
    (tmp_path / "test_thin.py").write_text(
        textwrap.dedent(
            f"""
            import sys
            import pytest
            sys.path.insert(0, {str(Path(__file__).parents[2])!r})
            from fray.testing import ClusterConformance
            from tests.local.local_harness import LocalHarness

            class ThinHarness(LocalHarness):
                def __init__(self, root, cache):
                    super().__init__(root, cache)
                    self.spec = f"thin:{{root}}"

            class TestThin(ClusterConformance):
                @pytest.fixture
                def harness(self, tmp_path):
                    with ThinHarness(tmp_path / "store", tmp_path / "cache") as harness:
                        yield harness
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_thin.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout
    assert " skipped" not in done.stdout


def test_nothing_is_imported_before_it_is_asked_for(site: Path) -> None:
    entry_points = "[fray.backends]\nlazy = lazy_backend:Nothing\n[fray.job_contexts]\nlazy = lazy_backend:Nothing\n"
    add_distribution(site, "fray-lazy", entry_points, {"lazy_backend": "raise RuntimeError('imported')"})
    program = """
    import sys, fray
    from fray.plugins import list_plugins
    names = [plugin.name for plugin in list_plugins()]
    print("lazy" in names, "lazy_backend" in sys.modules, "fray.backend.local" in sys.modules)
    """
    assert run(site, program) == "True False False"


def test_a_broken_plugin_is_named_and_breaks_only_itself(site: Path, tmp_path: Path) -> None:
    entry_points = (
        "[fray.backends]\nbroken = broken_backend:Cluster\nwrong = thin_wrong:NAME\nabsent = no_such_module_4f1c:X\n"
        "[fray.job_contexts]\na-broken = broken_backend:Context\n"
    )
    modules = {"broken_backend": "raise RuntimeError('broken on purpose')", "thin_wrong": "NAME = 3"}
    add_distribution(site, "fray-broken", entry_points, modules)
    program = f"""
    import fray
    for name in ("broken", "wrong", "absent"):
        try:
            fray.connect(name)
        except fray.errors.BackendLoadError as error:
            print(error)
    print(fray.connect("local:{tmp_path}/store").list_jobs(), type(fray.get_job_context()).__name__)
    """
    said = run(site, program).splitlines()
    assert "fray-broken 1.2" in said[0]
    assert "RuntimeError: broken on purpose" in said[0]
    assert "no ClusterContext" in said[1]
    assert "no_such_module_4f1c" in said[2]
    assert said[3] == "[] LocalJobContext"


def test_a_name_that_two_claim_is_an_error_that_names_both(site: Path, tmp_path: Path) -> None:
    add_distribution(site, "rival", "[fray.backends]\nlocal = thin_backend:Thin\n", {"thin_backend": THIN})
    program = """
    import fray
    try:
        fray.connect("local")
    except fray.errors.BackendConflictError as error:
        print(error)
    print(type(fray.connect("in-memory")).__name__)
    """
    said = run(site, program).splitlines()
    assert "fray-local" in said[0]
    assert "rival 1.2" in said[0]
    assert said[1] == "LocalClusterContext"


def test_the_same_distribution_twice_on_the_path_is_one(site: Path, tmp_path: Path) -> None:
    from fray.shipping import write_light_part

    light = write_light_part(tmp_path)
    program = f"import fray; print(fray.__file__); print(type(fray.connect('local:{tmp_path}/s')).__name__)"
    said = run(light, program).splitlines()
    assert said == [f"{light}/fray/__init__.py", "SubprocessClusterContext"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("docker", "pip install fray-docker"),
        ("locl", "did you mean 'local'"),
        ("dokcer", "did you mean 'docker'"),
        ("zzz", "there are: "),
    ],
)
def test_an_unknown_name_gets_help(name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_entry_points", lambda group: {})  # as with nothing but fray-core
    for spec in (name, f"{name}:somewhere"):
        with pytest.raises(BackendNotFoundError, match=hint):
            fray.connect(spec)


def test_a_backend_registered_in_this_process_is_found(tmp_path: Path) -> None:
    from fray.backend.local import SubprocessClusterContext

    class Mine(SubprocessClusterContext):
        name = "mine"

    plugins.register_backend("mine", Mine)
    try:
        assert isinstance(fray.connect(f"mine:{tmp_path}"), Mine)
    finally:
        plugins._registered.pop("mine")


class TestConfiguration:
    @pytest.fixture(autouse=True)
    def project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "deep" / "er").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "deep" / "er")
        monkeypatch.delenv("FRAY_CLUSTER", raising=False)
        return tmp_path

    def test_clusters_are_named_in_the_nearest_file(self, project: Path) -> None:
        (project / "pyproject.toml").write_text(
            f"""
[tool.fray]
default = "mine"
[tool.fray.clusters.mine]
backend = "local"
address = "{project}/store"
grace_seconds = 2.5
"""
        )
        for cluster in (fray.connect("mine"), fray.connect()):
            assert cluster.spec == f"local:{project}/store"
            assert cluster._grace_seconds == 2.5  # type: ignore[attr-defined]
        assert fray.connect("mine", grace_seconds=1)._grace_seconds == 1  # type: ignore[attr-defined]
        (project / "deep" / "fray.toml").write_text('default = "in-memory"\n')
        assert fray.connect().name == "in-memory"

    def test_a_pyproject_without_a_table_is_passed_over(self, project: Path) -> None:
        (project / "fray.toml").write_text('default = "in-memory"\n')
        (project / "deep" / "pyproject.toml").write_text('[project]\nname = "not-fray"\n')
        assert fray.connect().name == "in-memory"

    def test_the_environment_comes_before_the_file(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (project / "fray.toml").write_text('default = "nonsense"\n')
        monkeypatch.setenv("FRAY_CLUSTER", "in-memory")
        assert fray.connect().name == "in-memory"

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("[clusters", "not valid TOML"),
            ("defalt = 'x'", "defalt"),
            ("default = 3", "default"),
            ("[clusters.a]\naddress = 'x'", "backend"),
            ("[clusters.a]\nbackend = 3", "backend"),
            ("clusters = 3", "clusters"),
        ],
    )
    def test_a_file_that_cannot_be_is_refused_by_its_name(self, project: Path, content: str, words: str) -> None:
        (project / "fray.toml").write_text(content)
        with pytest.raises(InvalidValueError, match=words) as refused:
            find_config()
        assert str(project / "fray.toml") in str(refused.value)

    def test_an_option_that_there_is_not_is_refused(self, project: Path) -> None:
        with pytest.raises(InvalidValueError, match=r"no option 'colour'.*grace_seconds"):
            fray.connect(f"local:{project}/store", colour="red")
        with pytest.raises(InvalidValueError, match="it has none"):
            fray.connect("in-memory", colour="red")


def test_in_memory_create_job_not_supported() -> None:
    with pytest.raises(fray.UnsupportedError, match="In-memory backend doesn't support create_job") as refused:
        fray.LocalClusterContext().create_job("python my_job.py")
    assert isinstance(refused.value, NotImplementedError)
    assert "pip install fray-local" in str(refused.value)
    assert fray.LocalClusterContext().list_jobs() == []
    with pytest.raises(fray.JobNotFoundError):
        fray.LocalClusterContext().get_job("any")
