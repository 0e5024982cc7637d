"""`pytest --strict-skips` fails every skip but those for missing hardware or data, wherever the skip comes from."""

import os
import re
import shutil
import subprocess
import sys

import pytest

FILES = {
    "test_allowed.py": """
        import pytest
        def test_without_gpu(): pytest.skip("needs a GPU: none here")
        def test_without_data(): pytest.skip("needs ../shared/data: not there")
        def test_passes(): pass
        @pytest.mark.xfail
        def test_expected_to_fail(): assert False
        """,
    "test_lazy.py": """
        import pytest
        def test_call(): pytest.skip("tired of calls")
        @pytest.mark.skip(reason="tired of marks")
        def test_mark(): pass
        @pytest.mark.skipif(True, reason="tired of conditions")
        def test_condition(): pass
        @pytest.fixture
        def lazy(): pytest.skip("tired of fixtures")
        def test_fixture(lazy): pass
        """,
    "test_module.py": """
        import pytest
        pytest.importorskip("no_such_module", reason="tired of modules")
        """,
}
TIRED = {"calls", "marks", "conditions", "fixtures", "modules"}


@pytest.mark.slow(7)
def test_strict_skips(root, tmp_path):
    shutil.copy(root / "tests/conftest.py", tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(re.sub("^ {8}", "", text, flags=re.MULTILINE))
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rfEs",
        "-c",
        os.devnull,
        "--rootdir=.",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]

    def run(*options: str) -> tuple[int, str]:
        process = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        return process.returncode, process.stdout

    code, output = run()
    assert code == 0, output
    assert "1 passed, 7 skipped, 1 xfailed" in output

    code, output = run("--strict-skips", "--continue-on-collection-errors")
    assert code == 1, output
    refused = output[: output.index("short test summary info")]
    assert set(re.findall(r"skipped: 'tired of (\w+)'", refused)) == TIRED
    assert re.search(r"1 passed, 2 skipped, 1 xfailed", output), output

    code, output = run("--strict-skips", "test_allowed.py")
    assert code == 0, output
