"""What the README shows runs as it stands there, and what it names exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import baton, environment
from support.house import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """The `baton` command lines of the tour, without their comments."""
    lines = re.findall(r"^    (baton .*)$", README, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_engine_without_servers(tiny_llama: Path) -> None:
    [program] = [snippet for snippet in snippets("python") if "LLM" in snippet]
    program = program.replace("path/to/folder", str(tiny_llama))
    ran = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.strip()


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_verbs_and_flags_exist(command: list[str]) -> None:
    verb = [word for word in command if re.fullmatch(r"[a-z]+", word)]
    shown = baton(*verb, "--help")
    assert shown.returncode == 0, shown.stderr
    flags = [word for word in command if word.startswith("--")]
    assert all(f"{flag} " in shown.stdout for flag in flags), shown.stdout


def test_the_files_and_folders_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    folders = re.findall(r"^\| `([^`]+/)` \|", README, re.MULTILINE)
    assert links
    assert folders
    assert [path for path in (*links, *folders) if not (ROOT / path).exists()] == []
