"""What the pages of the documentation hold: code to run, commands, links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(
    r"(?:^|`)[ \t]*((?:snf-ext|python -m|torchrun|pytest|\.ci/\w+|bench/\w+\.sh)\b[^`\n]*)",
    re.MULTILINE,
)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fences(page: Path) -> list[tuple[str, str]]:
    """Language and content of each block."""
    return _FENCE.findall(text_of(page))


def blocks(page: Path, language: str) -> list[str]:
    return [content for found, content in fences(page) if found == language]


def run_python(page: Path) -> dict[str, Any]:
    """Run the page's Python blocks, one after the other; what they define."""
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, Python block {number}", "exec"), names)
    return names


def commands(page: Path) -> list[str]:
    """Each line of a block, and each piece of code in the text, that starts as a command does."""
    return [found.split(" → ")[0].strip() for found in _COMMAND.findall(text_of(page))]


def links(page: Path) -> list[str]:
    """Targets in the repository, without anchors."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", text_of(page))
    return [target for target in targets if "://" not in target]
