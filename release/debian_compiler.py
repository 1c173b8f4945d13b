"""The C++ compiler of an older Debian beside that of this machine, for wheels that an older C library can load.

Packages of the release are unpacked into a folder of their own, and nothing is installed.
"""

from __future__ import annotations

import hashlib
import lzma
import subprocess
import urllib.request
from pathlib import Path

ARCHIVE = "http://deb.debian.org/debian"
# For each release the version of its GCC, and what that loads to compile.
GCC = {"bullseye": ("10", ("libisl23", "libmpc3", "libmpfr6", "libgmp10", "zlib1g"))}


def debian_compiler(release: str, folder: Path) -> Path:
    """A program that compiles and links as g++ of the Debian release does, with its C library, unpacked in `folder`.

    Raises:
        ValueError: the release is not one of `GCC`.
        OSError: the archive cannot be reached, or what came is not what its list of packages says.
    """
    if release not in GCC:
        raise ValueError(f"expected a release of Debian among {', '.join(GCC)}, got {release!r}")
    version, libraries = GCC[release]
    names = {f"cpp-{version}", f"g++-{version}", f"gcc-{version}", f"libgcc-{version}-dev", f"libstdc++-{version}-dev"}
    names |= {"libc6", "libc6-dev", "libgcc-s1", "libgomp1", "libstdc++6", "linux-libc-dev", *libraries}
    root = folder / "root"
    root.mkdir(parents=True)
    for path, digest in _packages(release, names).items():
        package = folder / Path(path).name
        package.write_bytes(_fetch(path))
        if hashlib.sha256(package.read_bytes()).hexdigest() != digest:
            raise OSError(f"expected {path} as the list of packages of {release} describes it, got another file")
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
        package.unlink()
    for link in root.rglob("*"):
        if link.is_symlink() and (target := link.readlink()).is_absolute():
            link.unlink()
            link.symlink_to(root / target.relative_to("/"))
    compiler = folder / "g++"
    program = root / "usr" / "bin" / f"x86_64-linux-gnu-g++-{version}"
    compiler.write_text(
        f'#!/bin/sh\nLD_LIBRARY_PATH={root / "usr/lib/x86_64-linux-gnu"} exec {program} --sysroot={root} "$@"\n'
    )
    compiler.chmod(0o755)
    return compiler


def _packages(release: str, names: set[str]) -> dict[str, str]:
    """Where the archive has the named packages, and their SHA-256."""
    index = lzma.decompress(_fetch(f"dists/{release}/main/binary-amd64/Packages.xz")).decode()
    found = {}
    for paragraph in index.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Package") in names:
            names = names - {fields["Package"]}
            found[fields["Filename"]] = fields["SHA256"]
    if names:
        raise OSError(f"expected packages {', '.join(sorted(names))} in Debian {release}, found none")
    return found


def _fetch(path: str) -> bytes:
    with urllib.request.urlopen(f"{ARCHIVE}/{path}", timeout=120) as answer:
        content: bytes = answer.read()
    return content
