"""An extension of Sphinx: this project's docstrings as reStructuredText.

They are written to be read as they stand: equations are indented, may have vertical bars, and a
sentence may be one letter long, which would begin a list.
"""

from __future__ import annotations

import re
from typing import Any

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Warns|Yields):$")
_PARAGRAPH = re.compile(r"\s*(Cost|Parameters|Shapes|Source): ")
_BARS = re.compile(r"(``.*?``|`.*?`)|\|")
_LETTER = re.compile(r"(: |^ +)([A-Za-z])\.$")


def as_restructured_text(lines: list[str]) -> list[str]:
    """Indented blocks outside of sections as literal blocks; bars elsewhere as themselves."""
    result: list[str] = []
    in_section = literal = False
    for number, line in enumerate(lines):
        after_blank = number > 0 and not lines[number - 1].strip()
        if _PARAGRAPH.match(line) and not after_blank:
            result.append("")
        if line and not line[0].isspace():
            in_section, literal = _SECTION.match(line) is not None, False
        elif line and after_blank and not in_section and not literal:
            literal = True
            if not (result[:-1] and result[-2].endswith("::")):
                result += ["::", ""]
        doctest = line.lstrip().startswith((">>>", "..."))
        result.append(line if literal or doctest else _escaped(line))
    return result


def _escaped(line: str) -> str:
    line = _BARS.sub(lambda found: found[1] or r"\|", line)
    return _LETTER.sub(r"\1\\\2.", line)


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon reads the sections."""
    lines[:] = as_restructured_text(lines)


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which the docstring of the class describes."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True}
