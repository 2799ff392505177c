"""Holds a library's machine code against the processors that it has to run on.

``python .ci/instruction_sets.py LIBRARY``: code for AVX2 and AVX-512 may stand only in functions
of the namespaces ``avx2`` and ``avx512``, which run after a look at the processor; everything else
runs on any x86-64. What breaks that unseen is a template or an inline function of a header that is
compiled beside the kernels: the linker keeps one copy for all. Needs objdump.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

SETS = ("baseline", "avx2", "avx512")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
AVX512 = re.compile(
    r"%zmm|%[xy]mm(?:1[6-9]|2\d|3[01])\b|%k[0-7]\b"  # registers, or names that AVX2 has not
    r"|^v(?:pternlog|rndscale|perm[it]2|scalef|movdq[au](?:8|16|32|64)\b|pmullq|psraq|p(?:min|max)[su]q)"
)
# Of SSE3 to SSE4.2, POPCNT, BMI, MOVBE and AES what a compiler emits by itself. `tzcnt` is not
# among them: older processors run it as `bsf`, which compilers use on purpose.
NEWER = re.compile(
    r"(?:addsub|h(?:add|sub)|blendv?|dp|round)[ps][sd]|p(?:h(?:add|sub)\w+|shufb|abs[bwd]|alignr|sign[bwd])"
    r"|pm(?:add[u]bsw|ulhrsw|ulld|uldq|in(?:s[bd]|u[wd])|ax(?:s[bd]|u[wd])|ov[sz]x\w\w)"
    r"|p(?:blend\w+|cmp(?:eqq|gtq|[ei]str\w)|ext?r[bdq]|insr[bdq]|test|ackusdw)|p?(?:extract|insert)ps"
    r"|mov(?:ddup|s[hl]dup|ntdqa|be)|lddqu|mpsadbw|crc32\w?|popcnt\w?|lzcnt\w?|andn|bextr|bls\w+|bzhi"
    r"|mulx|pdep|pext|[rs][ah][lr]x|rorx|aes\w+|pclmul\w+"
)


def needed_set(instruction: str) -> str:
    """The first of SETS that has an instruction, given as objdump writes it."""
    mnemonic = instruction.split(maxsplit=1)[0]
    if mnemonic.startswith(("v", "k")) and AVX512.search(instruction):
        return "avx512"
    if mnemonic.startswith("v") or NEWER.fullmatch(mnemonic):
        return "avx2"
    return "baseline"


def owned_set(function: str) -> str:
    """The set that a function's name says it is compiled for."""
    return next((name for name in ("avx512", "avx2") if name in function), "baseline")


def scan(disassembly: Iterable[str]) -> tuple[Counter[str], list[str]]:
    """How many functions use which set, and a line for each that uses more than its name says."""
    rows: list[tuple[str, str, str]] = []  # function, set, instruction; names may come twice
    for line in disassembly:
        if heading := FUNCTION.match(line):
            rows.append((heading[1], "baseline", ""))
        elif line.count("\t") == 1 and (instruction := line.split("\t")[1].strip()):
            found = needed_set(instruction)
            if SETS.index(found) > SETS.index(rows[-1][1]):
                rows[-1] = (rows[-1][0], found, instruction)
    problems = [
        f"{function[:200]}: {instruction}"
        for function, found, instruction in rows
        if SETS.index(found) > SETS.index(owned_set(function))
    ]
    return Counter(found for _, found, _ in rows), problems


def check(library: str) -> str | list[str]:
    """What was found, or a line for each problem."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", library]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    if "file format elf64-x86-64" not in result.stdout:
        return f"{library} is not for x86-64"
    counts, problems = scan(result.stdout.splitlines())
    if problems:
        return problems
    if not all(counts[name] for name in SETS):
        return [f"{library}: each set must have functions, and symbols to tell; got {counts}"]
    return ", ".join(f"{name} in {counts[name]} functions" for name in SETS)


def main() -> int:
    """The exit status: 1 where a function needs a newer processor than its name says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    found = check(parser.parse_args().library)
    print(found if isinstance(found, str) else "\n".join(found))
    return 0 if isinstance(found, str) else 1


if __name__ == "__main__":
    sys.exit(main())
