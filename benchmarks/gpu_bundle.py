"""Pack what a GPU host without network lacks, to be carried there in parts: `make gpu-bundle`.

The host has its own Python, torch and Triton. The bundle adds Baton's base dependencies within
requirements/constraints.txt, NIXL without the plugins that Baton never loads, and a Redis server.
Each part is a tar of its own, so they may travel and be unpacked one by one.

    python benchmarks/gpu_bundle.py [--python 3.12] [--nixl nixl-cu13==1.5.1] [--out FOLDER]
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from baton.cli.redis_server import find_redis_server

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
# pip matches the version of glibc exactly; 2.28 is what the dependencies ask for at most.
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1)),
    "manylinux2014_x86_64",
]
# What the host brings itself, in the versions that fit its driver.
ON_THE_HOST = re.compile(r"torch|triton|numpy|nvidia[-_].*|cuda[-_].*")
NIXL_PLUGINS = {"libplugin_UCX.so", "libplugin_POSIX.so"}
# UCX opens its modules by name, so nobody's NEEDED lists them.
UCX_LIBRARY = re.compile(r"libuc[mpst]\W.*|libuc[mt]_.*")
SHARED_OBJECT = re.compile(r".+\.so(\.[\w.-]+)?")
# Part of every glibc, and of one piece with it.
LIBC = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util|nsl|crypt))\.so.*")

README = """What a GPU host without network needs to run Baton from a checkout.

    eval "$(sh unpack.sh /tmp/baton-site)"        # sets PYTHONPATH and PATH
    export PYTHONPATH=$PYTHONPATH:$PWD/typings    # in the checkout: import baton.*
    python3 -m baton.cli up --help

Made for CPython {python} on x86-64 Linux with glibc 2.28 or newer, with torch and Triton there.
The parts are tars of their own: unpack.sh takes those that lie beside it, in any order.

{contents}
"""
UNPACK = """#!/bin/sh
# sh unpack.sh FOLDER: makes FOLDER/site, for PYTHONPATH, and FOLDER/bin of the parts beside it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?usage: sh unpack.sh FOLDER}"
folder=$(cd "$1" && pwd)
for part in "$here"/part-*.tar.gz; do
    tar -xzf "$part" -C "$folder"
done
echo "export PYTHONPATH=$folder/site\\${PYTHONPATH:+:\\$PYTHONPATH} PATH=$folder/bin:\\$PATH"
"""
REDIS_WRAPPER = """#!/bin/sh
lib=$(cd "$(dirname "$0")/../redis" && pwd)
LD_LIBRARY_PATH="$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$lib/redis-server" "$@"
"""


def main() -> None:
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-") as folder:
        stage = Path(folder)
        site = stage / "site"
        dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "dependencies"
        ]
        install(site, dependencies, options.python)
        check_complete(site, dependencies, options.python)
        base = size_of(site)
        install(site, [options.nixl], options.python, "--no-deps")
        whole = size_of(site) - base
        slim_nixl(site)
        pack_redis(stage)
        contents = (
            f"site    {base / MIB:.0f} MiB of dependencies, {options.nixl} of "
            f"{(size_of(site) - base) / MIB:.0f} MiB ({whole / MIB:.0f} as it comes)\n"
            f"redis   {size_of(stage / 'redis') / MIB:.0f} MiB, a server and its libraries"
        )
        options.out.mkdir(parents=True, exist_ok=True)
        for old in options.out.glob("part-*.tar.gz"):
            old.unlink()
        parts = pack(stage, options.out, options.part_mib * MIB)
    (options.out / "README.txt").write_text(README.format(python=options.python, contents=contents))
    (options.out / "unpack.sh").write_text(UNPACK)
    print(contents)
    for part in parts:
        print(f"{part}  {part.stat().st_size / MIB:.1f} MiB")


def install(site: Path, requirements: list[str], python: str, *flags: str) -> None:
    """Wheels for the host's Python, which need not be this one, into the folder `site`."""
    platforms = [flag for name in PLATFORMS for flag in ("--platform", name)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade"),
            *("--target", str(site), "--only-binary=:all:", "--implementation", "cp"),
            *("--python-version", python, *platforms, *flags),
            *("-c", str(ROOT / "requirements" / "constraints.txt"), *requirements),
        ],
        check=True,
    )
    # Commands and headers: modules are all that PYTHONPATH finds.
    for name in ("bin", "include", "pkgconfig"):
        shutil.rmtree(site / name, ignore_errors=True)


def check_complete(site: Path, requirements: list[str], python: str) -> None:
    """pip reads the markers of requirements as of the Python that runs it, not of the host's."""
    environment = {**default_environment(), "python_version": python, "extra": ""}
    environment["python_full_version"] = f"{python}.0"
    found = {canonicalize_name(each.name): each for each in distributions(path=[str(site)])}
    missing = set()
    pending, seen = [Requirement(text) for text in requirements], set()
    while pending:
        wanted = pending.pop()
        name = canonicalize_name(wanted.name)
        if name not in found:
            missing.add(name)
            continue
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        for text in found[name].requires or []:
            inner = Requirement(text)
            extras = [{**environment, "extra": extra} for extra in ("", *wanted.extras)]
            if inner.marker is None or any(inner.marker.evaluate(each) for each in extras):
                pending.append(inner)
    foreign = sorted(name for name in found if ON_THE_HOST.fullmatch(name))
    if missing or foreign:
        sys.exit(
            f"error: for Python {python} the bundle lacks {missing} and must not hold {foreign}"
        )


def slim_nixl(site: Path) -> None:
    """Keep what the bindings, two plugins and UCX's modules load; drop all other libraries."""
    [bindings] = site.glob("nixl_cu*/_bindings.*.so")
    package = bindings.parent
    own = [package, site / f".{package.name}.mesonpy.libs", site / f"{package.name}.libs"]
    found = [path for folder in own for path in folder.rglob("*.so*")]
    objects = [path for path in found if SHARED_OBJECT.fullmatch(path.name)]
    roots = [
        path
        for path in objects
        if path.parent == package or path.name in NIXL_PLUGINS or UCX_LIBRARY.fullmatch(path.name)
    ]
    keep = closure(roots, objects)
    for path in objects:
        if path not in keep:
            path.unlink()
    shutil.rmtree(site / f"{package.name}.scripts", ignore_errors=True)
    shutil.rmtree(site / package.name.replace("nixl_", "nixl_ep_"), ignore_errors=True)


def closure(roots: list[Path], objects: list[Path]) -> set[Path]:
    """The roots and all that they load of `objects`, looked up by name."""
    named: dict[str, list[Path]] = {}
    for path in objects:
        named.setdefault(path.name, []).append(path)
    keep: set[Path] = set()
    pending = list(roots)
    while pending:
        path = pending.pop()
        if path not in keep:
            keep.add(path)
            pending += [found for name in needed(path) for found in named.get(name, [])]
    return keep


def needed(path: Path) -> list[str]:
    """The libraries that a shared object names; from the dynamic section."""
    command = ["readelf", "--dynamic", "--wide", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\)[^\[]*\[([^\]]+)\]", shown)


def pack_redis(stage: Path) -> None:
    """A Redis server with the libraries that the host may lack, behind a script that finds them."""
    server = find_redis_server().resolve()
    folder = stage / "redis"
    folder.mkdir()
    shutil.copy2(server, folder / "redis-server")
    linked = subprocess.run(["ldd", str(server)], capture_output=True, text=True, check=True).stdout
    for name, path in re.findall(r"(\S+) => (/\S+)", linked):
        if not LIBC.fullmatch(name):
            shutil.copy2(Path(path).resolve(), folder / name)
    wrapper = stage / "bin" / "redis-server"
    wrapper.parent.mkdir()
    wrapper.write_text(REDIS_WRAPPER)
    wrapper.chmod(0o755)


def pack(stage: Path, out: Path, limit: int) -> list[Path]:
    """Tars of at most `limit` bytes, whatever does not compress."""
    parts: list[Path] = []
    tar: tarfile.TarFile | None = None
    for path in files_below(stage):
        # zlib holds back less than this, and a header is 512 bytes.
        ahead = path.stat().st_size + MIB
        if tar is None or parts[-1].stat().st_size + ahead > limit:
            if tar is not None:
                tar.close()
            parts.append(out / f"part-{len(parts) + 1}.tar.gz")
            tar = tarfile.open(parts[-1], "w:gz")  # noqa: SIM115 (the next part closes it)
        tar.add(path, arcname=str(path.relative_to(stage)), filter=_anonymous)
    if tar is not None:
        tar.close()
    too_large = [part for part in parts if part.stat().st_size > limit]
    if too_large:
        sys.exit(f"error: {too_large} hold a single file that does not fit in a part")
    return parts


def files_below(folder: Path) -> Iterator[Path]:
    for top, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield Path(top) / name


def size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in files_below(folder))


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    return entry


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default="3.12", help="the host's Python")
    parser.add_argument("--nixl", default="nixl-cu13==1.5.1", help="the wheel for its CUDA")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "gpu-bundle")
    parser.add_argument("--part-mib", type=int, default=58, help="the size of a part at most")
    return parser


if __name__ == "__main__":
    main()
