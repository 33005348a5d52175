"""What is in a page of documentation: its fenced blocks, links and headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\s*$")
NO_RUN = re.compile(r"^<!-- no-run: \S.* -->$")
FILE_LINE = re.compile(r"# ([\w./-]+\.(?:py|toml|yaml|txt))(?::.*)?")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, what it is in, what it says, and whether the page exempts it."""

    page: Path
    line: int
    language: str
    text: str
    is_exempt: bool

    @property
    def file_name(self) -> str | None:
        """The file that the block is, by its first line."""
        found = FILE_LINE.fullmatch(self.text.partition("\n")[0])
        return found[1] if found else None

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    before, begin, language, lines = "", 0, "", []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if begin:
            if line == "```":
                text = "".join(f"{each}\n" for each in lines)
                found.append(Block(page, begin, language, text, bool(NO_RUN.match(before))))
                before, begin = "", 0
            else:
                lines.append(line)
        elif fence := FENCE.match(line):
            begin, language, lines = number, fence[1], []
        elif line.strip():
            before = line
    assert not begin, f"{page.name}:{begin}: the block has no end"
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The names that a page's headings are linked by, as on GitHub."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(page)}
