"""The README tells the truth: its Python runs, its commands have the options shown, its links and extras exist."""

import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from palm_rlhf.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
LANGUAGES = {"python", "bash", "json", "text"}
FENCE = re.compile(r"^```(?P<info>.*)\n(?P<code>(?:.*\n)*?)```$", re.MULTILINE)


class Block(NamedTuple):
    section: str
    line: int  # of its first line of code, from 1
    info: str  # what stands behind the opening fence
    code: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, each with the heading of the second level that it stands under."""
    found = []
    for match in FENCE.finditer(text):
        before = FENCE.sub("", text[: match.start()])
        headings = re.findall(r"^## (.+)$", before, re.MULTILINE)
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(headings[-1] if headings else "", line, match["info"].strip(), match["code"]))
    return found


def python_sections(found: list[Block]) -> dict[str, str]:
    """One script for each section, its blocks in order, each at its line in the README, where a traceback points."""
    scripts = {}
    for section, line, info, code in found:
        if info == "python":
            script = scripts.get(section, "")
            scripts[section] = script + "\n" * (line - 1 - script.count("\n")) + code
    return scripts


def commands(found: list[Block]) -> list[list[str]]:
    """The commands of the shell blocks, split into words; comments and continued lines are understood."""
    lines = "\n".join(block.code for block in found if block.info == "bash").replace("\\\n", " ").splitlines()
    parts = (part for line in lines for part in line.split("&&"))
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def is_ours(words: list[str]) -> bool:
    return words[0] == "palm-rlhf" or (words[0] == "python" and words[1].startswith(("examples/", "benchmarks/")))


def run(*words: str, cwd: Path) -> str:
    process = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL
    )
    assert process.returncode == 0, f"{shlex.join(words)} failed:\n{process.stdout}{process.stderr}"
    return process.stdout


@cache
def help_text(*door: str) -> str:
    if door[0] != "palm-rlhf":
        return run(*door[1:], "--help", cwd=ROOT)
    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        main([*door[1:], "--help"])
    assert not end.value.code
    return said.getvalue()


def unknown_options(words: list[str]) -> list[str]:
    """The long options of a command that its own --help does not know."""
    # `palm-rlhf data clean`, `palm-rlhf evaluate lm`, `palm-rlhf generate` or `python examples/train.py`
    door = words[: 3 if words[0] == "palm-rlhf" and words[1] in ("data", "evaluate") else 2]
    options = [word.split("=")[0] for word in words[len(door) :] if word.startswith("--")]
    known = set(re.findall(r"--[\w.-]+", help_text(*door)))
    return [option for option in options if option not in known]


BLOCKS = blocks(README.read_text(encoding="utf-8"))
SECTIONS = python_sections(BLOCKS)
COMMANDS = [words for words in commands(BLOCKS) if is_ours(words)]


def test_every_block_names_its_language():
    """So that no Python hides from the tests below, neither untagged nor under a tag of its own."""
    assert BLOCKS
    assert {block.info for block in BLOCKS} <= LANGUAGES


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """The errors of the Python of each section, run one after another in one process, as in a notebook."""
    folders = {section: tmp_path_factory.mktemp("section") for section in SECTIONS}
    for section, folder in folders.items():
        (folder / "README.md").write_text(SECTIONS[section], encoding="utf-8")
    run(__file__, *map(str, folders.values()), cwd=ROOT)
    return {section: (folder / "errors").read_text(encoding="utf-8") for section, folder in folders.items()}


def run_sections(folders: list[str]) -> None:
    """Run README.md in each folder, and write its traceback, or nothing, to the file errors."""
    for folder in folders:
        os.chdir(folder)
        try:
            runpy.run_path("README.md", run_name="__main__")
            Path("errors").write_text("", encoding="utf-8")
        except Exception:
            Path("errors").write_text(traceback.format_exc(), encoding="utf-8")


@pytest.mark.slow(50)
@pytest.mark.parametrize("section", SECTIONS)
def test_python_runs(section, failures):
    assert not failures[section], failures[section]


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_commands_have_the_options_shown(words):
    assert unknown_options(words) == []


def test_extras_exist():
    extras = set(",".join(re.findall(r"(?:\.|palm-rlhf)\[([\w,-]+)\]", README.read_text(encoding="utf-8"))).split(","))
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "test" in extras
    assert [extra for extra in extras if f'"{extra}"' not in setup] == []


def test_links_into_the_checkout_lead_somewhere():
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", FENCE.sub("", README.read_text(encoding="utf-8")))
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (ROOT / target).exists()] == []


SAMPLE = """# Title
```python
a = 1
```
## First
text
```bash
pip install x && palm-rlhf generate runs/a \\
    --prompt "a b" --nonsense=3  # comment
python examples/train.py
```
```python
b = 2
```
words
```python
assert b == 2
```
## Second
```json
{}
```
"""


def test_blocks_are_found_in_their_sections():
    assert [(block.section, block.line, block.info) for block in blocks(SAMPLE)] == [
        ("", 3, "python"),
        ("First", 8, "bash"),
        ("First", 13, "python"),
        ("First", 17, "python"),
        ("Second", 21, "json"),
    ]


def test_blocks_of_a_section_share_a_script_that_keeps_their_lines():
    scripts = python_sections(blocks(SAMPLE))
    assert list(scripts) == ["", "First"]
    lines = SAMPLE.splitlines()
    for script in scripts.values():
        assert all(line in ("", lines[i]) for i, line in enumerate(script.splitlines()))
    exec(scripts["First"], {})


def test_commands_are_read_as_a_shell_reads_them():
    assert commands(blocks(SAMPLE)) == [
        ["pip", "install", "x"],
        ["palm-rlhf", "generate", "runs/a", "--prompt", "a b", "--nonsense=3"],
        ["python", "examples/train.py"],
    ]


def test_an_option_that_does_not_exist_is_found():
    assert unknown_options(["palm-rlhf", "generate", "runs/a", "--prompt", "a b", "--nonsense=3"]) == ["--nonsense"]


if __name__ == "__main__":
    run_sections(sys.argv[1:])
