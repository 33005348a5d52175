"""The one description of an image that Fray makes, and its two renderings: for BuildKit, and for the classic builder.

Layers from the one that changes least: base, CA bundle, user, packages, source, the project itself. BuildKit sees uv,
the lock and the caches through mounts below /dev, which is not part of a layer; the classic builder, which has no
mounts, copies them into a layer and removes them in the last step that needs them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ENVIRONMENT_SECRET",
    "USER_ID",
    "WORKSPACE",
    "Dialect",
    "Recipe",
    "find_base_images",
    "free_venv",
    "render",
]

Dialect = Literal["buildkit", "classic"]

WORKSPACE = "/workspace"
USER_ID = 1000
ENVIRONMENT_SECRET = "fray-environment"
_VENV = "/opt/venv"
_CA_BUNDLE = "/etc/fray/ca.pem"
_BUILD_TOOLS: Mapping[Dialect, str] = {"buildkit": "/dev/fray", "classic": "/opt/fray-build"}
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_KNOWN_LATER = "the-user-of-the-base-image"

_MAKE_USER = (
    "grep -q '^fray:' /etc/passwd || { "
    f"echo 'fray:x:{USER_ID}:{USER_ID}:fray:/home/fray:/bin/sh' >> /etc/passwd; "
    f"grep -q '^[^:]*:[^:]*:{USER_ID}:' /etc/group || echo 'fray:x:{USER_ID}:' >> /etc/group; }}; "
    f"mkdir -p /home/fray {WORKSPACE}; chown {USER_ID}:{USER_ID} /home/fray {WORKSPACE}"
)
_FIND_PYTHON = (
    "base=$(command -v python3 || command -v python) || "
    "{ echo 'the base image has no python3, which packages need' >&2; exit 1; }"
)
# addsitedir, not a plain path: the base's own .pth files and editable installs count too.
_SITE_FOLDERS = (
    "import site, sys; "
    "folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else []); "
    "sys.stdout.write(''.join('import site; site.addsitedir(%r)\\n' % folder for folder in folders))"
)


@dataclass(frozen=True)
class Recipe:
    """What the image consists of.

    Attributes:
        base: What stands after `FROM`.
        keep_user: Whether the base's own user stays; otherwise it is `fray`.
        user: The base's user, where it stays and is known.
        venv: Where the packages go.
        has_ca_bundle: Whether `ca.pem` is in the context.
        has_lock: Whether `pylock.toml` is.
        has_requirements: Whether `requirements.txt` is.
        has_source: Whether `source.tar` is.
        lock_indexes: The named indexes of the project, `name=url`.
        local_projects: What of the lock is installed from the source, as uv's arguments.
        settings: The names of the user's settings of uv that count for the packages.
        settings_digest: What tells their values from others.
        uv_image: The image that holds uv.
        project: For the label.
    """

    base: str
    keep_user: bool = False
    user: str | None = None
    venv: str = _VENV
    has_ca_bundle: bool = False
    has_lock: bool = False
    has_requirements: bool = False
    has_source: bool = False
    lock_indexes: tuple[str, ...] = ()
    local_projects: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    settings_digest: str = ""
    uv_image: str = ""
    project: str = ""

    @property
    def has_packages(self) -> bool:
        """Whether anything is installed."""
        return self.has_lock or self.has_requirements or bool(self.local_projects)

    @property
    def is_overlay(self) -> bool:
        """Whether the base's own packages stay importable."""
        return self.keep_user or not (self.has_lock or self.local_projects)


def render(recipe: Recipe, dialect: Dialect) -> str:
    """Return the recipe as a Dockerfile."""
    tools = _BUILD_TOOLS[dialect]
    lines: list[str] = []
    is_staged = recipe.has_source and recipe.keep_user and recipe.user != ""
    if is_staged:
        lines += ["FROM scratch AS source", "ADD source.tar /", ""]
    lines += [f"FROM {recipe.base}", "USER root"]
    if recipe.has_ca_bundle:
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "CURL_CA_BUNDLE")
        lines += [f"COPY ca.pem {_CA_BUNDLE}", "ENV " + " ".join(f"{name}={_CA_BUNDLE}" for name in names)]
    if not recipe.keep_user:
        lines.append(f"RUN {_MAKE_USER}")
    if recipe.has_packages:
        lines.append(f"ENV VIRTUAL_ENV={recipe.venv} PATH={recipe.venv}/bin:${{PATH:-{_DEFAULT_PATH}}}")
        lines += _install_packages(recipe, dialect, tools)
    if not recipe.keep_user:
        lines.append("ENV PYTHONUNBUFFERED=1")
    # What changes with each edit comes last: in the classic builder every later step costs a container.
    lines.append(f"LABEL fray.image=1 fray.project={json.dumps(recipe.project)}")
    user = "fray" if not recipe.keep_user else (recipe.user if recipe.user is not None else _KNOWN_LATER)
    if is_staged:
        # Before WORKDIR, which would make the directory root's.
        lines.append(f"COPY --from=source --chown={user} {WORKSPACE} {WORKSPACE}")
    if recipe.has_source or not recipe.keep_user:
        lines.append(f"WORKDIR {WORKSPACE}")
    if user and not recipe.local_projects:
        lines.append(f"USER {user}")
    if recipe.has_source and not is_staged:
        lines.append("ADD source.tar /")
    if recipe.local_projects:
        lines += _install_projects(recipe, dialect, tools, user)
        if user:
            lines.append(f"USER {user}")
    return "\n".join(lines) + "\n"


def _install_packages(recipe: Recipe, dialect: Dialect, tools: str) -> list[str]:
    files = [
        name
        for name, is_there in (("pylock.toml", recipe.has_lock), ("requirements.txt", recipe.has_requirements))
        if is_there
    ]
    lines = []
    if dialect == "classic":
        lines.append(f"COPY --from={recipe.uv_image} /uv {tools}/uv")
    python = f"{recipe.venv}/bin/python"
    make = [_FIND_PYTHON, f'{tools}/uv venv --quiet --no-project --python "$base" {recipe.venv}']
    if recipe.is_overlay:
        make.append(
            f"for site in {recipe.venv}/lib/python*/site-packages; do "
            f'"$base" -c {shlex.quote(_SITE_FOLDERS)} > "$site/_fray_base.pth"; done'
        )
    install = f"{tools}/uv pip install --compile-bytecode --python {python}"
    # The lock and the requirements have a layer each: a change of the latter leaves the former.
    if recipe.has_lock or not recipe.has_requirements:
        commands = list(make)
        if recipe.has_lock:
            indexes = "".join(f" --index {shlex.quote(index)}" for index in recipe.lock_indexes)
            commands.append(f"{install} --preview-features pylock{indexes} -r {tools}/pylock.toml")
        lines += _run(recipe, dialect, tools, commands, ["pylock.toml"] if recipe.has_lock else [])
        make = []
    if recipe.has_requirements:
        commands = [*make]
        if recipe.settings_digest:
            commands.insert(0, f": settings {recipe.settings_digest}")
        if recipe.is_overlay and not recipe.has_lock:
            # What the base has already stays the base's: only what uv would add to it, or change, goes on top.
            found = f'"{recipe.venv}/.fray-wanted"'
            commands += [
                f'{tools}/uv pip install --dry-run --break-system-packages --python "$base" '
                f"-r {tools}/requirements.txt > {found} 2>&1 || {{ cat {found} >&2; exit 1; }}",
                rf"sed -n 's/^ [+~] \([^ ]*\)==[^ ]* (from \(.*\))$/\1 @ \2/p; t; s/^ [+~] //p' {found} > {found}.txt",
                f"cat {found}.txt",
                f"if [ -s {found}.txt ]; then {install} --no-deps -r {found}.txt; fi",
                f"rm {found} {found}.txt",
            ]
        else:
            commands.append(f"{install} -r {tools}/requirements.txt")
        lines += _run(recipe, dialect, tools, commands, ["requirements.txt"])
    if dialect == "classic" and files and not recipe.local_projects:
        # In the layer of the last command, so that the image's file system does not have them.
        lines[-1] = f"{lines[-1]}; rm -rf {tools}"
    return lines


def _install_projects(recipe: Recipe, dialect: Dialect, tools: str, user: str) -> list[str]:
    projects = " ".join(recipe.local_projects)
    commands = [
        f"cd {WORKSPACE}",
        f"{tools}/uv pip install --no-deps --python {recipe.venv}/bin/python {projects}",
    ]
    if user:
        # A build backend may have left files beside the source.
        owner = f"{USER_ID}:{USER_ID}" if user == "fray" else user
        commands.append(f"find {WORKSPACE} -user 0 -exec chown {shlex.quote(owner)} {{}} +")
    if dialect == "classic":
        commands.append(f"rm -rf {tools}")
    return _run(recipe, dialect, tools, commands, [])


def _run(recipe: Recipe, dialect: Dialect, tools: str, commands: list[str], files: list[str]) -> list[str]:
    settings = "UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_NO_PROGRESS=1 NO_COLOR=1"
    if dialect == "classic":
        lines = [f"COPY {name} {tools}/{name}" for name in files]
        lines += [f"ARG {name}" for name in recipe.settings]
        command = "; ".join(["set -eu", f"export {settings} UV_NO_CACHE=1", *commands])
        return [*lines, f"RUN {command}"]
    mounts = [f"type=bind,from={recipe.uv_image},source=/uv,target={tools}/uv"]
    mounts += [f"type=bind,source={name},target={tools}/{name}" for name in files]
    mounts += [f"type=secret,id={ENVIRONMENT_SECRET},target={tools}/environment"]
    mounts += [f"type=cache,id=fray-uv,target={tools}/cache"]
    begin = ["set -eu", f"export {settings} UV_CACHE_DIR={tools}/cache"]
    begin.append(f"if [ -f {tools}/environment ]; then set -a; . {tools}/environment; set +a; fi")
    command = "; \\\n    ".join([*begin, *commands])
    return ["RUN " + " \\\n    ".join(f"--mount={mount}" for mount in mounts) + f" \\\n    {command}"]


def free_venv(environment: list[str]) -> str:
    """Return where an environment goes on top of a base: beside one that the base has there already.

    Args:
        environment: The base's, as the engine lists it.
    """
    path = next((entry.removeprefix("PATH=") for entry in environment if entry.startswith("PATH=")), "")
    taken = {folder.rstrip("/") for folder in path.split(":")}
    number, venv = 1, _VENV
    while f"{venv}/bin" in taken:
        number += 1
        venv = f"{_VENV}{number}"
    return venv


def find_base_images(dockerfile: str, build_args: Mapping[str, str], target: str | None) -> tuple[list[str], str]:
    """Return the images that a Dockerfile of somebody's begins from or copies from, and the target stage's own base.

    An image whose name is made of variables that nothing sets is left out: the build itself will say so.
    """
    values: dict[str, str] = {}
    stages: dict[str, str] = {}
    images: list[str] = []
    current, is_global, count = "", True, 0
    text = re.sub(r"\\[ \t]*\r?\n", " ", re.sub(r"(?m)^[ \t]*#.*\n?", "", dockerfile))
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        instruction, rest = word.upper(), rest.strip()
        if instruction == "ARG" and is_global:
            name, _, default = rest.partition("=")
            values[name] = build_args.get(name, default.strip("\"'"))
        elif instruction == "FROM":
            is_global = False
            parts = [part for part in rest.split() if not part.startswith("--")]
            if not parts:
                continue
            name = _substitute(parts[0], values)
            current = stages.get(name.lower(), name)
            if name.lower() not in stages and name and name != "scratch" and name not in images:
                images.append(name)
            stages[str(count)] = current
            if len(parts) > 2 and parts[1].upper() == "AS":
                stages[parts[2].lower()] = current
            count += 1
            if target is not None and target.lower() in stages:
                return images, stages[target.lower()]
        elif instruction in ("COPY", "ADD", "RUN"):
            for found in re.findall(r"(?:--from=|[,=]from=)([^\s,]+)", rest):
                name = _substitute(found, values)
                if name and name.lower() not in stages and name != "scratch" and name not in images:
                    images.append(name)
    return images, current


def _substitute(text: str, values: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return values.get(match[1] or match[3]) or match[2] or ""

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)", value, text.strip("\"'"))
