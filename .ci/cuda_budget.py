"""Holds what each CUDA kernel uses against the committed budget, and prints it.

``python3 .ci/cuda_budget.py LOG BUDGET [--update]``: LOG is ``nvcc --version`` followed by the
output of a build with ``-Xptxas=-v``, BUDGET the JSON file that ``--update`` writes anew.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

REGISTER_UNIT = 8  # a GPU hands out a thread's registers in eights, so fewer more cost nothing


class Usage(NamedTuple):
    """What one kernel needs on one architecture."""

    registers: int  # of a thread
    shared: int  # bytes of a block, without what its launch asks for
    stack: int  # bytes of a thread
    spill: int  # bytes that a thread stores and loads because registers ran out


Kernels = dict[str, dict[str, Usage]]  # by name, then by architecture

ENTRY = re.compile(
    r"'(\S+)' for '(\w+)'.*?Used (\d+) registers(?:[^\n]* (\d+) bytes smem)?", flags=re.DOTALL
)
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def readable(symbols: list[str]) -> list[str]:
    """Names as in the source, without parameters and our namespaces."""
    command, text = ["c++filt", "-p"], "\n".join(symbols)
    names = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    return re.sub(r"snf::|\(anonymous namespace\)::", "", names).splitlines()


def parse(log: str) -> Kernels:
    """Usage of every kernel in the log.

    Functions that ptxas did not inline are listed after a kernel and count as part of it.
    """
    symbols, rows = [], []
    for part in log.split("Compiling entry function ")[1:]:
        entry = ENTRY.match(part)
        if entry is None:
            raise ValueError(f"ptxas must say how many registers a kernel uses; got {part[:500]}")
        symbol, arch, registers, shared = entry.groups(default="0")
        frames = zip(*FRAME.findall(part), strict=True)
        stack, stores, loads = (sum(map(int, sizes)) for sizes in frames)
        symbols.append(symbol)
        rows.append((arch, Usage(int(registers), int(shared), stack, stores + loads)))
    names = readable(symbols)
    kernels: Kernels = {name: {} for name in sorted(names)}
    for name, (arch, usage) in zip(names, rows, strict=True):
        other = kernels[name].get(arch, usage)
        kernels[name][arch] = Usage(*map(max, usage, other))  # of several files: the worst
    return {  # sm_75 comes before sm_100
        name: dict(sorted(row.items(), key=lambda item: (len(item[0]), item[0])))
        for name, row in kernels.items()
    }


def compiler(log: str) -> str:
    """The version of nvcc that the log names."""
    return re.findall(r"release .*, V([\d.]+)", log)[0]


def dump(kernels: Kernels, nvcc: str) -> str:
    """The text of a budget file, a line a kernel."""
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in kernels.items())
    columns = json.dumps(Usage._fields)
    return f'{{"nvcc": "{nvcc}", "columns": {columns}, "kernels": {{\n{rows}\n}}}}\n'


def load(text: str) -> tuple[Kernels, str]:
    """The kernels of a budget file, and the version of nvcc that they were compiled with."""
    budget = json.loads(text)
    kernels = {
        name: {arch: Usage(*usage) for arch, usage in row.items()}
        for name, row in budget["kernels"].items()
    }
    return kernels, budget["nvcc"]


def regressions(budget: Kernels, kernels: Kernels) -> list[str]:
    """A line for everything in which the kernels do not keep to the budget; spills never do."""
    lines = []
    for name in sorted(budget.keys() | kernels.keys()):
        allowed, used = budget.get(name, {}), kernels.get(name, {})
        for arch in allowed | used:
            if arch not in allowed or arch not in used:
                problem = "built, not in the budget" if arch in used else "in the budget, not built"
                lines.append(f"{name} on {arch}: {problem}")
                continue
            rounded = -(-allowed[arch].registers // REGISTER_UNIT) * REGISTER_UNIT
            limits = allowed[arch]._replace(registers=rounded, spill=0)
            lines += [
                f"{name} on {arch}: {field} {value}, allowed {limit}"
                for field, limit, value in zip(Usage._fields, limits, used[arch], strict=True)
                if value > limit
            ]
    return lines


def table(kernels: Kernels) -> str:
    """Registers and shared bytes of every kernel, and its stack where it has one."""
    archs = list(dict.fromkeys(arch for row in kernels.values() for arch in row))
    lines = [["registers/shared bytes", *archs]]
    for name, row in kernels.items():
        lines.append([name])
        for arch in archs:
            registers, shared, stack, _ = row.get(arch, (0,) * 4)
            lines[-1].append(f"{registers}/{shared}" + f" stack {stack}" * (stack > 0))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where a kernel does not keep to the budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("budget", type=Path)
    parser.add_argument("--update", action="store_true", help="write the budget anew")
    args = parser.parse_args(arguments)
    log = args.log.read_text(encoding="utf-8")
    kernels, nvcc = parse(log), compiler(log)
    if not kernels:
        parser.error(f"{args.log} names no kernel; was it written with -Xptxas=-v?")
    print(table(kernels))
    budget, of = (kernels, nvcc) if args.update else load(args.budget.read_text(encoding="utf-8"))
    problems = regressions(budget, kernels)
    if problems:
        print("", *problems, sep="\n")
        print(f"\n{len(problems)} not within {args.budget}; spills never are. Where the rest is")
        print("meant, write it anew: .ci/cuda_build --update-budget")
        if of != nvcc:
            print(f"The budget is of nvcc {of}, and this is {nvcc}.")
        return 1
    if args.update:
        args.budget.write_text(dump(kernels, nvcc), encoding="utf-8")
    print(f"{len(kernels)} kernels within {args.budget}, nvcc {nvcc}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
