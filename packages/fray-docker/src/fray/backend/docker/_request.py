"""What either builder is given, and what is said where it fails."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fray.backend.docker._context import Context

__all__ = ["SHOWN_LINES", "BuildRequest"]

SHOWN_LINES = 20
"""How many of the last lines of a failing step its error shows."""

# As OpenSSL, GnuTLS, Rust's webpki, Go and curl say it.
_UNTRUSTED = re.compile(
    r"CERTIFICATE_VERIFY_FAILED|certificate verification failed|UnknownIssuer|signed by unknown authority|"
    r"self[- ]signed certificate|unable to get local issuer certificate",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class BuildRequest:
    """One build, ready to be sent.

    Attributes:
        tag: What the image will be called.
        context: What is sent.
        dockerfile_name: Which file of the context says how.
        target: The stage to build, where not the last.
        build_args: Values of `ARG`; they are not secrets.
        inherited_args: The names of those whose values are not to be shown in a command line: proxies.
        labels: To be put on the image.
        platform: Which one to build for, as `linux/arm64`; None is the engine's own.
        secrets: By id, for `RUN --mount=type=secret`.
    """

    tag: str
    context: Context
    dockerfile_name: str = "Dockerfile"
    target: str | None = None
    build_args: Mapping[str, str] = field(default_factory=dict)
    inherited_args: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    platform: str | None = None
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def failure(self, where: str, said: Iterable[str]) -> str:
        """Return the message of the error.

        Args:
            where: What failed.
            said: Its last lines.
        """
        lines = "\n".join(said)
        message = f"the image {self.tag} could not be built: {where}; its last lines:\n{lines}"
        if re.search(r"\bRUN ", where) and _UNTRUSTED.search(lines):  # what is pulled, the engine has to trust
            message += (
                "\nThe image does not trust that certificate. If it is your proxy's, the image needs it: by the option "
                "ca_bundle ('system' is what this machine trusts), or by a step of your own Dockerfile"
            )
        return message
