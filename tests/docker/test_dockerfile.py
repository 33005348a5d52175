"""The one description of an image and its two renderings; what is read out of a Dockerfile of somebody's."""

from __future__ import annotations

import pytest

from fray.backend.docker._dockerfile import Recipe, find_base_images, free_venv, render

FULL = Recipe(
    base="python:3.11-slim",
    has_ca_bundle=True,
    has_lock=True,
    has_requirements=True,
    has_source=True,
    local_projects=("--editable", "/workspace"),
    uv_image="fray/uv:1-amd64",
    project="demo",
)


def test_nothing_to_install_makes_no_environment() -> None:
    text = render(Recipe(base="busybox", has_source=True, project="demo"), "buildkit")
    assert "/opt/venv" not in text
    assert "--mount" not in text
    assert text.splitlines()[-2:] == ["USER fray", "ADD source.tar /"], "what changes most comes last"


def test_a_kept_user_is_what_the_base_says() -> None:
    recipe = Recipe(base="them:1", keep_user=True, has_requirements=True, uv_image="fray/uv:1", project="demo")
    assert render(Recipe(base="them:1", keep_user=True, user="", project="demo"), "buildkit") == (
        'FROM them:1\nUSER root\nLABEL fray.image=1 fray.project="demo"\n'
    )
    named = render(Recipe(**{**vars(recipe), "user": "app", "has_source": True}), "buildkit")
    assert "COPY --from=source --chown=app /workspace /workspace" in named
    assert named.index("USER app") > named.index("requirements.txt")
    assert "fray:x:" not in named


def test_the_classic_builder_gets_no_mounts_and_removes_its_tools() -> None:
    text = render(FULL, "classic")
    assert "--mount" not in text
    assert text.count("rm -rf /opt/fray-build") == 1
    assert text.index("rm -rf /opt/fray-build") > text.index("ADD source.tar")


def test_buildkit_sees_tools_only_through_mounts_that_are_in_no_layer() -> None:
    text = render(FULL, "buildkit")
    assert text.count("COPY") == 1, "the CA bundle"
    targets = [part.partition("target=")[2].split()[0] for part in text.split("--mount=")[1:]]
    assert targets
    assert all(target.startswith("/dev/") for target in targets)


def test_an_environment_goes_beside_one_that_the_base_has() -> None:
    assert free_venv(["PATH=/usr/bin"]) == "/opt/venv"
    assert free_venv([]) == "/opt/venv"
    assert free_venv(["A=1", "PATH=/opt/venv/bin:/usr/bin"]) == "/opt/venv2"
    assert free_venv(["PATH=/opt/venv2/bin:/opt/venv/bin"]) == "/opt/venv3"


@pytest.mark.parametrize(
    ("dockerfile", "args", "target", "expected"),
    [
        ("FROM a:1\nRUN x", {}, None, (["a:1"], "a:1")),
        ("ARG V=1\nFROM a:${V} AS base\nFROM base\n", {"V": "2"}, None, (["a:2"], "a:2")),
        ("ARG V=1\nFROM a:$V AS base\nFROM b AS last\n", {}, "base", (["a:1"], "a:1")),
        (
            "from --platform=linux/amd64 a as x\nfrom scratch\ncopy --from=c:1 /x /y\n",
            {},
            None,
            (["a", "c:1"], "scratch"),
        ),
        ("FROM a\nRUN --mount=type=bind,from=t:1,target=/t \\\n  # said\n  /t/x\n", {}, None, (["a", "t:1"], "a")),
        ("FROM a AS one\nFROM b\nCOPY --from=0 /x /\nCOPY --from=ONE /x /\n", {}, None, (["a", "b"], "b")),
        ("FROM $MISSING\n", {}, None, ([], "")),
    ],
)
def test_the_images_of_a_dockerfile(
    dockerfile: str, args: dict[str, str], target: str | None, expected: tuple[list[str], str]
) -> None:
    assert find_base_images(dockerfile, args, target) == expected
