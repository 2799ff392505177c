"""Holds a wheel against the sdist that it was built from: its files, its library, its metadata.

``python .ci/wheel_check.py WHEEL SDIST``
"""

from __future__ import annotations

import argparse
import email
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import instruction_sets


def sources(sdist: Path) -> set[str]:
    """The files of the package in an sdist, as a wheel names them."""
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[-1] for member in archive if member.isfile()}
    return {name for name in names if name.startswith("snf_ext/")}


def file_problems(names: set[str], wanted: set[str]) -> list[str]:
    """What is missing in a wheel, and what stands there that should not."""
    native = {name for name in names if name.startswith("snf_ext/_C.") and name.endswith(".so")}
    problems = [] if len(native) == 1 else [f"one snf_ext/_C.*.so is wanted; got {sorted(native)}"]
    package = {n for n in names if ".dist-info/" not in n and not n.endswith("/")} - native
    wanted = wanted | {"snf_ext/_build.json"}
    problems += [f"missing: {name}" for name in sorted(wanted - package)]
    return problems + [f"not wanted: {name}" for name in sorted(package - wanted)]


def metadata_problems(metadata: str, version: str) -> list[str]:
    """A wheel's version says which torch it is for; its requirement would not change a torch."""
    fields = email.message_from_string(metadata)
    problems = []
    if not fields["Version"].startswith(f"{version}+torch"):
        problems.append(f"Version must be {version}+torch...; got {fields['Version']}")
    requirements = fields.get_all("Requires-Dist", [])
    if not any(line.replace(" ", "").startswith("torch>=") for line in requirements):
        problems.append(f"Requires-Dist must have torch>=...; got {requirements}")
    return problems


def library_problems(library: Path) -> list[str]:
    """Paths of the machine that built it, and code that not every processor has."""
    command = ["readelf", "--dynamic", str(library)]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    problems = [f"path of this machine: {line}" for line in dynamic.splitlines() if "PATH)" in line]
    found = instruction_sets.check(str(library))
    return problems + (found if isinstance(found, list) else [])


def check(wheel: Path, sdist: Path) -> list[str]:
    """A line for each problem."""
    version = sdist.name.removesuffix(".tar.gz").split("-")[1]
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
        names = set(archive.namelist())
        problems = file_problems(names, sources(sdist))
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        problems += metadata_problems(archive.read(about).decode(), version)
        if not any(name.endswith("/LICENSE") for name in names):
            problems.append("missing: LICENSE")
        for name in sorted(names):
            if name.endswith(".so"):
                problems += library_problems(Path(archive.extract(name, scratch)))
    return problems


def main() -> int:
    """The exit status: 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("sdist", type=Path)
    args = parser.parse_args()
    problems = check(args.wheel, args.sdist)
    print(
        *problems or [f"{args.wheel.name}: files, metadata and library as they should be"], sep="\n"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
