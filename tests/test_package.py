"""What is installed: the archives, the requirements, imports without what may be missing, and the console script."""

import ast
import email
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import palm_rlhf
from palm_rlhf import PaLM
from palm_rlhf.cli import COMMANDS, main
from palm_rlhf.ops.cpu.native_library import why_not


def run_python(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, timeout=900, stdin=subprocess.DEVNULL, **options
    )


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    process = run_python("-c", code, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def archives(root, tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the source archive, built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("build")
    source, built = folder / "source", folder / "built"
    ignored = shutil.ignore_patterns(".git", "*.egg-info", "__pycache__", "build", "dist", "runs", ".*_cache", ".venv")
    shutil.copytree(root, source, ignore=ignored)
    build = f"from setuptools.build_meta import *; build_wheel({str(built)!r}); build_sdist({str(built)!r})"
    process = run_python("-c", build, cwd=source, text=True)
    assert process.returncode == 0, process.stderr
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    return wheel, sdist


def shipped_files(root: Path) -> set[str]:
    package = root / "palm_rlhf"
    site = (f"feedback/web/{folder}" for folder in ("locales", "static", "templates"))
    folders = ("ops/cpu/csrc", "serving/page", "evaluation/reports/page", *site)
    files = [*package.rglob("*.py"), *(file for folder in folders for file in (package / folder).iterdir())]
    data = {"palm_rlhf/py.typed", "palm_rlhf/ops/attention_choices.json"}
    data.add("palm_rlhf/feedback/store/migrations/script.py.mako")
    return {path.relative_to(root).as_posix() for path in files} | data


def test_wheel_holds_the_whole_package_and_nothing_else(root, archives):
    names = set(zipfile.ZipFile(archives[0]).namelist())
    assert {name for name in names if ".dist-info/" not in name} == shipped_files(root)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_what_is_needed_to_build_and_to_test(root, archives):
    names = {name.partition("/")[2] for name in tarfile.open(archives[1]).getnames()}
    expected = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "tests/conftest.py", "tests/test_package.py"}
    assert shipped_files(root) | expected <= names


@pytest.fixture(scope="module")
def metadata(archives) -> email.message.Message:
    """The METADATA of the wheel."""
    with zipfile.ZipFile(archives[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def test_metadata(metadata, root):
    assert metadata["Name"] == "palm-rlhf"
    assert metadata["Version"] == palm_rlhf.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert (root / "README.md").read_text(encoding="utf-8").strip() in metadata.get_payload(decode=True).decode()


def test_the_test_extra_contains_the_extras_that_tests_use(metadata):
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]

    def of(extra):
        wanted = (r for r in requirements if r.marker and r.marker.evaluate({"extra": extra}))
        return {(r.name, str(r.specifier)) for r in wanted if not r.marker.evaluate({"extra": ""})}

    for extra in ("hf", "plot", "tensorboard", "triton"):
        assert of(extra)
        assert of(extra) <= of("test")


@pytest.mark.parametrize(
    "system, machine, exists",
    [("Linux", "x86_64", True), ("Linux", "aarch64", True), ("Darwin", "arm64", False), ("Windows", "AMD64", False)],
)
def test_triton_is_never_fetched_unasked_and_never_fights_the_pin_of_torch(metadata, system, machine, exists):
    """Builds of torch for GPUs require it themselves; beside one for CPUs it is 286 MB that nothing would run."""
    found = [r for r in map(Requirement, metadata.get_all("Requires-Dist")) if r.name == "triton"]
    assert all(str(triton.specifier) == "" for triton in found)
    for extra, wanted in (("", False), ("serve", False), ("triton", exists), ("test", exists)):
        environment = {"platform_system": system, "platform_machine": machine, "extra": extra}
        assert any(triton.marker.evaluate(environment) for triton in found) is wanted


def test_console_script_leads_to_main(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "palm-rlhf = palm_rlhf.cli:main" in wheel.read(name).decode()


def test_everything_works_without_triton():
    names = python(
        """
import sys
sys.modules["triton"] = None  # what an import finds where Triton is not installed
import importlib, pkgutil, torch, palm_rlhf
from palm_rlhf.ops.devices import available_implementations

for module in pkgutil.walk_packages(palm_rlhf.__path__, "palm_rlhf."):
    if ".ops.triton." not in module.name:
        importlib.import_module(module.name)
palm = palm_rlhf.PaLM(num_tokens=8, dim=16, depth=1, heads=2, dim_head=8)
palm(torch.randint(8, (1, 4)), return_loss=True).backward()
assert palm.generate(4).shape == (1, 4)
print(*(name for name, reason in available_implementations("cuda").items() if reason))
"""
    ).split()
    assert names == ["flex", "triton"]


def test_import_loads_no_extra():
    optional = ["transformers", "matplotlib", "tensorboard", "triton", "palm_rlhf_pytorch", "pytest"]
    modules = ", ".join(command.module for command in COMMANDS.values())
    loaded = python(f"import sys, {modules}; print(*(name for name in {optional} if name in sys.modules))")
    assert loaded.split() == []


def test_import_and_top_level_help_load_neither_torch_nor_tyro():
    """They take seconds to import; the help of the console script needs none of them."""
    code = """
import sys
import palm_rlhf.cli

for arguments in (["--help"], ["--version"], []):
    try:
        palm_rlhf.cli.main(arguments)
    except SystemExit:
        pass
print(*({"torch", "tyro", "beartype"} & set(sys.modules)), sep=",")
"""
    assert python(code).splitlines()[-1] == ""


def test_a_subcommand_loads_no_other():
    code = """
import sys
from palm_rlhf.cli import COMMANDS, main
try:
    main(["data", "--help"])
except SystemExit:
    print(*(name for name in ("palm_rlhf.serving", "palm_rlhf.evaluation") if name in sys.modules), sep=",")
"""
    assert python(code).splitlines()[-1] == ""


def test_public_names_are_seen_before_they_are_loaded(root):
    """By dir(), by star imports, and by type checkers, which read what stands below TYPE_CHECKING."""
    names = python("import palm_rlhf; print(*(name for name in palm_rlhf.__all__ if name in dir(palm_rlhf)))").split()
    assert names == palm_rlhf.__all__
    assert python("from palm_rlhf import *; print(PaLM.__module__, RLHFTrainer.__module__)").split() == [
        "palm_rlhf.model.palm",
        "palm_rlhf.training.rlhf.trainer",
    ]
    tree = ast.parse((root / "palm_rlhf/__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    checked = {alias.name: node.module for node in block.body for alias in node.names}
    assert {name: getattr(palm_rlhf, name).__module__ for name in checked} == checked
    assert {*checked, "__version__"} == set(palm_rlhf.__all__)
    with pytest.raises(AttributeError, match="'palm_rlhf' has no attribute 'PaLm'"):
        _ = palm_rlhf.PaLm


@pytest.mark.parametrize("name", COMMANDS)
def test_summaries_are_those_of_the_docstrings(name):
    command = COMMANDS[name]
    docstring = inspect.getdoc(getattr(importlib.import_module(command.module), command.function))
    assert docstring.split("\n\n")[0].replace("\n", " ") == command.summary


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"palm-rlhf {palm_rlhf.__version__}\n"


@pytest.mark.slow(9)
@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_that_is_not_utf_8_gets_help_and_text(checkpoint, environment):
    """What it cannot show is a question mark; after the prompt the model says é, 日, 🙂 and a blank."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONIOENCODING"} | environment
    options = ["--prompt", "n", "--max-new-tokens", str(len(TEXT.encode()) - 1), "--temperature", "0"]
    code = f"""
from palm_rlhf.cli import main

for arguments in (["--help"], ["data", "clean", "--help"], ["evaluate", "judge", "--help"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0
print("the text")
main(["generate", {str(checkpoint)!r}, *{options}])
"""
    process = run_python("-c", code, env=environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.partition(b"the text\n")[2] == b"??? \n"


def test_info_tells_versions_and_implementations():
    process = run_python("-m", "palm_rlhf.cli", "info", text=True)
    assert process.returncode == 0, process.stderr
    for fact in (palm_rlhf.__version__, torch.__version__, sys.version.split()[0], "eager on cpu: usable", "triton"):
        assert fact in process.stdout
    native = "usable" if why_not() is None else f"refused, {why_not()}"
    assert f"native     C kernels: {native}\n" in process.stdout


def test_info_tells_why_there_are_no_kernels():
    process = run_python("-m", "palm_rlhf.cli", "info", text=True, env={**os.environ, "PALM_RLHF_NATIVE": "0"})
    assert "C kernels: refused, PALM_RLHF_NATIVE is 0\n" in process.stdout, process.stderr


def test_help_names_every_subcommand_and_describes_every_option(capsys):
    for arguments, expected in (
        (["--help"], ["info", "generate", "Continue a text", "Print the versions"]),
        (["generate", "--help"], ["MODEL", "--prompt", "--max-new-tokens", "--temperature", "--top-p", "--seed"]),
        (["generate", "--help"], ["hub id", "Number of tokens to sample", "Seed of the sample"]),
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())  # lines may break anywhere
        assert [text for text in expected if text not in shown] == []


TEXT = "né日🙂 "  # characters of one to four bytes, no byte twice: each byte tells the next


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A byte-level model that has learnt to repeat TEXT."""
    torch.manual_seed(0)
    palm = PaLM(num_tokens=256, dim=32, depth=1, heads=1, dim_head=16)
    tokens = torch.tensor([list((TEXT * 4).encode())])
    optimizer = torch.optim.Adam(palm.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        palm(tokens, return_loss=True).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("checkpoint") / "palm"
    palm.save_pretrained(folder)
    return folder


def generated(capsys, checkpoint: Path, *options: str) -> str:
    main(["generate", str(checkpoint), *options])
    return capsys.readouterr().out


def test_generate_prints_characters_of_several_bytes(capsys, checkpoint):
    num_bytes = len((TEXT * 2).encode())
    options = ["--prompt", TEXT, "--max-new-tokens", str(num_bytes), "--temperature", "0"]
    assert generated(capsys, checkpoint, *options) == TEXT * 2 + "\n"


def test_generate_never_prints_half_a_character(capsys, checkpoint, monkeypatch):
    """Cut after two of the three bytes of 日: every write but the last holds whole characters."""
    written = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    main(["generate", str(checkpoint), "--prompt", TEXT, "--max-new-tokens", "5", "--temperature", "0"])
    assert [text for text in written if text] == ["n", "é", "\ufffd", "\n"]


def test_generate_repeats_itself_with_a_seed_only(capsys, checkpoint):
    options = ["--prompt", TEXT, "--max-new-tokens", "32", "--temperature", "5"]
    samples = [generated(capsys, checkpoint, *options, "--seed", seed) for seed in ("1", "1", "2")]
    assert samples[0] == samples[1] != samples[2]


def test_generate_takes_the_fewest_bytes_with_top_p(capsys, checkpoint):
    """At a nearly flat temperature, a tiny top_p still leaves the likeliest byte alone."""
    options = ["--prompt", TEXT, "--max-new-tokens", str(len(TEXT.encode())), "--temperature", "3", "--top-p", "1e-6"]
    assert generated(capsys, checkpoint, *options) == TEXT + "\n"


def test_generate_says_what_is_wrong_in_one_line(checkpoint, tmp_path):
    PaLM(num_tokens=257, dim=8, depth=1, heads=1, dim_head=8).save_pretrained(tmp_path / "large")
    for folder, options, expected in (
        (tmp_path / "missing", [], "there is no folder"),
        (tmp_path / "large", [], "got 257 tokens"),
        (checkpoint, ["--temperature=-1"], "got temperature=-1.0"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(["generate", str(folder), "--prompt", "a", *options])
        assert exit.value.code.startswith("palm-rlhf: ")
        assert expected in exit.value.code
        assert "\n" not in exit.value.code


def test_a_triton_that_is_too_old_is_told_by_its_version(tmp_path):
    """Not by the module that it lacks."""
    (tmp_path / "triton/language").mkdir(parents=True)
    (tmp_path / "triton/__init__.py").write_text('__version__ = "3.1.0"\n')
    (tmp_path / "triton/language/__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    code = "from palm_rlhf.ops.devices import available_implementations as a; print(a('cuda')['triton'])"
    process = run_python("-c", code, text=True, env=environment)
    reason = "Triton 3.1.0: the kernels were never compiled with it; use torch 2.6 or newer, which brings Triton 3.2\n"
    assert process.stdout == reason, process.stderr
    assert reason in run_python("-m", "palm_rlhf.cli", "info", text=True, env=environment).stdout
