"""What works in the checkout is also in the wheel, and what type checkers need is there."""

import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from support.house import ROOT, SCRIPT_FOLDERS, package_folders, pyproject, tracked_folders

# Each top-level part: import name of the part to its folder.
PARTS = {name: folder for name, folder in package_folders().items() if name.count(".") == 1}


def folders_with_code() -> set[str]:
    """Every folder that holds importable modules, relative to the checkout."""
    apart = {"tests", *SCRIPT_FOLDERS}
    return {
        str(path.parent.relative_to(ROOT))
        for top in tracked_folders()
        if top.name not in apart
        for path in top.rglob("*.py")
    }


def test_every_folder_with_code_is_packaged() -> None:
    assert set(package_folders().values()) == folders_with_code()


def test_the_two_tables_name_the_same_packages() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(package_folders())
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(("package", "folder"), package_folders().items())
def test_a_package_is_named_by_its_folder(package: str, folder: str) -> None:
    expected = "baton.v1" if folder == "protos/baton/v1" else f"baton.{folder.replace('/', '.')}"
    assert package == expected


@pytest.mark.parametrize(("package", "folder"), PARTS.items())
def test_type_checkers_find_each_part(package: str, folder: str) -> None:
    link = ROOT / "typings" / package.replace(".", "/")
    assert link.is_symlink(), f"{link} is missing: ln -s ../../{folder} {link}"
    assert link.resolve() == (ROOT / folder).resolve()


def test_no_link_leads_nowhere() -> None:
    links = {path.name for path in (ROOT / "typings" / "baton").iterdir()}
    assert links == {package.removeprefix("baton.") for package in PARTS}


def test_mypy_checks_each_part() -> None:
    assert set(pyproject()["tool"]["mypy"]["packages"]) == set(PARTS) - {"baton.v1"}


def test_each_part_is_typed() -> None:
    missing = [
        folder
        for folder in PARTS.values()
        if folder != "protos/baton/v1" and not (ROOT / folder / "py.typed").is_file()
    ]
    assert missing == []


def test_kernels_is_no_package_by_itself() -> None:
    """A bare package `kernels` on the path breaks transformers: docs/decisions/0001."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_other_folder_is_a_package() -> None:
    bare = {"kernels", "kernels/bench", "protos/baton/v1"}
    missing = [
        folder
        for folder in set(package_folders().values()) - bare
        if not (ROOT / folder / "__init__.py").is_file()
    ]
    assert missing == []


def test_lua_scripts_are_reachable_as_resources() -> None:
    found = resources.files("baton.metadata").joinpath("lua")
    names = {entry.name for entry in found.iterdir()}
    assert names == {path.name for path in (ROOT / "metadata" / "lua").iterdir()}
    for name in names:
        assert found.joinpath(name).read_text().startswith("--"), f"{name} says what it does"


def test_the_wheel_holds_all_of_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for top in {Path(folder).parts[0] for folder in package_folders().values()}:
        copytree(ROOT / top, source / top, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    shipped = ROOT / "models" / "baton_tiny"
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder)}"
        for package, folder in package_folders().items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".pyi", ".proto", ".lua")
        or path.name == "py.typed"
        or path.parent == shipped
    }
    assert expected - packed == set()
    assert packed - expected == set()
