# SPDX-License-Identifier: Apache-2.0
"""The recipes for other people's CI in docs/conformance.md, run word for word."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import venv
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from tests.roots import REPOSITORY, import_path

pytestmark = pytest.mark.timeout(300)
PAGE = (REPOSITORY / "docs/conformance.md").read_text(encoding="utf-8")
PLAIN = Path(__file__).parent / "others" / "plain_balloon.py"
BASELINE = "conformance-baseline.json"
ONLY = " --only test_features.py --answer-limit 6 --time-limit 30"
"""Added to each command of the suite, to keep the run short and the limits wide."""


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of the page that are in *language*."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """Return the commands of the suite in a block, each on one line."""
    flat = re.sub(r"\\\n\s*", " ", textwrap.dedent(text))
    flat = re.sub(r">-\n\s*(.*)\n\s*(--)", r"\n\1 \2", flat)
    return [line.strip() for line in flat.splitlines() if "virtio-conformance --spawn" in line]


GITHUB, GITLAB = blocks("yaml")
(CONTAINER,) = blocks("dockerfile")
FIRST = [line for block in blocks("") for line in commands(block) if "--write-baseline" in line]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a recipe's command by a shell in *folder*, with the plain balloon as the back-end."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    tool = tools / "virtio-conformance"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m virtio_conformance.run "$@"\n')
    tool.chmod(0o755)
    spawn = shlex.join([sys.executable, str(PLAIN), "--numbering", "fixed"])
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": import_path(),
        "BACKEND": f"{spawn} {{socket}}",
        "DEVICE": "balloon",
    }
    return subprocess.run(
        ["bash", "-euc", command + ONLY],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def known(*failures: tuple[str, str]) -> str:
    """Return the text of a baseline file."""
    return json.dumps({"baseline": 1, "known": [{"row": r, "test": t} for r, t in failures]})


def test_the_first_command_writes_a_baseline(tmp_path: Path) -> None:
    (command,) = FIRST
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / BASELINE).read_text())["baseline"] == 1


@pytest.mark.parametrize("recipe", [GITHUB, GITLAB], ids=["github", "gitlab"])
def test_a_job_ends_well_and_leaves_its_reports(tmp_path: Path, recipe: str) -> None:
    (tmp_path / BASELINE).write_text(known())
    (command,) = commands(recipe)
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    suite = ET.parse(tmp_path / "conformance.xml").getroot()
    assert int(suite.attrib["tests"]) > 5
    assert suite.attrib["failures"] == "0"
    assert "<html" in (tmp_path / "conformance.html").read_text(encoding="utf-8")


def test_a_job_without_its_baseline_says_so(tmp_path: Path) -> None:
    (command,) = commands(GITHUB)
    done = run(command, tmp_path)
    assert done.returncode == 2
    assert BASELINE in done.stderr


def test_the_recipes_install_what_the_repository_has() -> None:
    for recipe in GITHUB, GITLAB:
        places = re.findall(r"\./suite/(\S+)", recipe)
        assert len(places) == 2
        assert all((REPOSITORY / place / "pyproject.toml").is_file() for place in places)


def test_the_steps_of_the_container(tmp_path: Path) -> None:
    copies = dict(re.findall(r"^COPY (\S+) (\S+)$", CONTAINER, re.MULTILINE))
    (install,) = re.findall(r"^RUN pip (.*)$", CONTAINER, re.MULTILINE)
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", CONTAINER, re.MULTILINE)
    home = {target: str(tmp_path / Path(source).name) for source, target in copies.items()}
    for source, target in copies.items():  # a build leaves files in its sources
        shutil.copytree(REPOSITORY / source, home[target])
    venv.create(tmp_path / "venv", with_pip=True)
    words = [home.get(word, word) for word in shlex.split(install)]
    pip = [str(tmp_path / "venv/bin/pip"), *words, "--quiet", "--no-deps"]
    subprocess.run(pip, check=True)
    (program,) = json.loads(entry)
    assert (tmp_path / "venv/bin" / program).is_file()
