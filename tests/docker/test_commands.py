"""`fray build` and `fray docker prune`, as their users meet them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fray.backend.docker._engine import Engine
from fray.backend.docker._prune import prune
from fray.backend.docker.cluster import DockerClusterContext
from fray.backend.docker.images import ImageBuilder
from fray.types import JobStatus, RuntimeEnv

from .docker_harness import DockerHarness
from .private_engine import PrivateEngine
from .registry import Registry

pytestmark = pytest.mark.xdist_group("docker")

REPOSITORY = "fray-test/command"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_image: str) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text("print('trained')\n")
    (folder / "fray.toml").write_text(f'[clusters.docker]\nbackend = "docker"\nbase_image = "{base_image}"\n')
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def harness(engine: Engine, base_image: str, registry: Registry) -> Iterator[DockerHarness]:
    with DockerHarness(engine, base_image, registry) as harness:
        yield harness


def fray(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fray.cli", *arguments]
    return subprocess.run(
        command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200
    )


def test_a_build_prints_the_images_name_and_the_second_does_nothing(engine: Engine, project: Path) -> None:
    first = fray("build", "--tag", REPOSITORY)
    assert first.returncode == 0, first.stderr
    (tag,) = first.stdout.splitlines()
    assert tag.startswith(f"{REPOSITORY}:")
    assert engine.inspect_image(tag)
    second = fray("build", "--tag", REPOSITORY)
    assert (second.stdout, second.stderr) == (first.stdout, "")
    (project / "train.py").write_text(f"print('trained again, {time.time_ns()}')\n")
    answer = json.loads(fray("build", "--tag", REPOSITORY, "--json").stdout)
    assert answer["tag"] != tag
    assert answer["was_built"]
    layers = [engine.api.inspect_image(each)["RootFS"]["Layers"] for each in (tag, answer["tag"])]
    assert len(layers[0]) == len(layers[1])
    assert layers[0][:-1] == layers[1][:-1], "only the source is another"


def test_what_was_pushed_runs_by_its_digest_after_the_local_copy_is_gone(
    harness: DockerHarness, engine: Engine, registry: Registry, base_image: str
) -> None:
    done = fray("build", "--push", "--tag", f"{registry.address}/team/project")
    assert done.returncode == 0, done.stderr
    digest = done.stdout.strip()
    assert digest.startswith(f"{registry.address}/team/project@sha256:")
    for image in engine.api.images(f"{registry.address}/team/project"):
        engine.api.remove_image(image["Id"], force=True)
    assert engine.inspect_image(digest) is None
    info = harness.run("python train.py; id -un; pwd", RuntimeEnv(container_image=digest))
    assert info.status is JobStatus.SUCCEEDED, info
    assert harness.cluster.get_logs(info.id) == "trained\nfray\n/workspace\n"
    engine.api.remove_image(digest, force=True)


def test_the_dockerfile_is_printed_and_nothing_is_built(engine: Engine) -> None:
    before = {image["Id"] for image in engine.api.images(all=True)}
    done = fray("build", "--print-dockerfile", "--package", "six")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FROM ") or "\nFROM " in done.stdout
    assert "requirements.txt" in done.stdout
    assert json.loads(fray("build", "--print-dockerfile", "--json").stdout)["dockerfile"]
    assert {image["Id"] for image in engine.api.images(all=True)} == before


def test_what_cannot_be_built_says_why() -> None:
    for arguments, code, words in [
        (["--push"], 2, "--tag"),
        (["--build-secret", "NOT_SET_4F1C"], 2, "NOT_SET_4F1C"),
        (["--build-arg", "x", "-f", "Dockerfile"], 2, "NAME=VALUE"),
        (["-f", "Dockerfile.none"], 2, "Dockerfile.none"),
        (["--tag", "UPPER:1"], 2, "UPPER"),
        (["no-such-directory"], 2, "no-such-directory"),
        (["--base-image", "127.0.0.1:1/no/such:image"], 69, "127.0.0.1:1/no/such:image"),
        (["-c", "local"], 2, "docker"),
    ]:
        done = fray("build", *arguments)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert done.stderr.startswith("fray: error: ")
        assert done.stdout == ""


def test_a_build_secret_is_there_and_nowhere_else(engine: Engine, project: Path, base_image: str) -> None:
    (project / "fray.toml").unlink()
    (project / "Dockerfile").write_text(
        f"FROM {base_image}\nRUN --mount=type=secret,id=TOKEN_4F1C wc -c < /run/secrets/TOKEN_4F1C > /size\n"
    )
    command = ["build", "-f", "Dockerfile", "--build-secret", "TOKEN_4F1C", "--tag", REPOSITORY]
    done = fray(*command, TOKEN_4F1C="s3cret-4f1c")
    assert done.returncode == 0, done.stderr
    tag = done.stdout.strip()
    assert "s3cret-4f1c" not in done.stderr + json.dumps([engine.api.history(tag), engine.api.inspect_image(tag)])


# Pruning: in an engine of its own, as a developer's may have images of Fray's that are not the tests'.


@pytest.fixture(scope="module")
def own_engine(private_engine: Callable[..., PrivateEngine], engine: Engine, shell_image: str) -> Iterator[Engine]:
    own = private_engine()
    own.start()
    own.load(shell_image, engine)
    client = Engine(own.endpoint)
    yield client
    client.close()
    own.close()


def derived(engine: Engine, base: str, name: str) -> str:
    """An image on top of another."""
    repository, _, tag = name.partition(":")
    container = engine.api.create_container_from_config({"Image": base, "Cmd": ["true"]})["Id"]
    engine.api.commit(container, repository, tag)
    engine.api.remove_container(container)
    return name


def test_pruning_says_what_it_would_remove_and_removes_it(own_engine: Engine, project: Path, shell_image: str) -> None:
    (project / "fray.toml").unlink()
    here = ["-c", f"docker:{own_engine.endpoint.host}"]
    (project / "unique").write_text(os.urandom(8).hex())
    tag = fray("build", "--base-image", shell_image, "--tag", REPOSITORY, *here).stdout.strip()
    assert own_engine.inspect_image(tag)
    dry = fray("docker", "prune", "--older-than", "0s", "--dry-run", *here)
    assert f"would remove image {tag}" in dry.stdout
    assert tag not in fray("docker", "prune", "--older-than", "12h", "--dry-run", *here).stdout, "by age"
    removed = json.loads(fray("docker", "prune", "--older-than", "0s", "--json", *here).stdout)
    assert tag in [each["name"] for each in removed]
    assert own_engine.inspect_image(tag) is None
    assert fray("docker", "prune", "--older-than", "soon").returncode == 2


def test_pruning_takes_nothing_that_is_used_or_not_frays(own_engine: Engine, tmp_path: Path, shell_image: str) -> None:
    def made(text: str) -> str:
        folder = tmp_path / text
        folder.mkdir()
        (folder / "file").write_text(text)
        builder = ImageBuilder(folder, engine=own_engine, base_image=shell_image, repository="fray-test/prune")
        return builder.build().tag

    used, unused = made("used"), made("unused")
    foreign = derived(own_engine, made("underneath"), "not-ours:1")  # it has the labels of Fray's
    foreign_volume = own_engine.api.create_volume("not-ours")["Name"]
    with DockerClusterContext(own_engine.endpoint.host) as cluster:
        info = cluster.wait(cluster.create_job("true", RuntimeEnv(container_image=used)), 60)
        foreign_container = own_engine.api.create_container_from_config({"Image": shell_image, "Cmd": ["true"]})["Id"]
        left = [each.name for each in prune(own_engine, 0, dry_run=True)]
        assert unused in left
        assert own_engine.inspect_image(unused), "a dry run removes nothing"
        removed = [each.name for each in prune(own_engine, 0)]
        assert unused in removed
        assert own_engine.inspect_image(unused) is None
        for image in (used, foreign, shell_image):
            assert image not in removed
            assert own_engine.inspect_image(image)
        assert own_engine.inspect_container(foreign_container)
        assert foreign_volume in [each["Name"] for each in own_engine.api.volumes()["Volumes"]]
        assert cluster.get_job(info.id) == info
        again = cluster.create_job("echo on", RuntimeEnv(container_image=used))
        assert cluster.wait(again, 60).status is JobStatus.SUCCEEDED
