"""The documentation tells the truth: each algorithm on offer has its page, and pages name what there is."""

import importlib
import importlib.util
import re
import typing
from pathlib import Path

import pytest

from palm_rlhf.training import LMConfig, PPOConfig, PreferenceConfig, RewardConfig, RolloutConfig
from palm_rlhf.training.rlhf.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/algorithms").glob("*.md"))}
INDEX = PAGES.pop("index")
CONFIGS = {kind.__name__: kind for kind in (LMConfig, PPOConfig, PreferenceConfig, RewardConfig, RolloutConfig)}
TEST = re.compile(r"tests/[\w/]+\.py(?:::\w+)?")
FILE = re.compile(r"`((?:palm_rlhf|tests|docs|examples|benchmarks|\.ci)/[\w/.-]*|[\w.-]+\.(?:py|toml|md|yml|yaml))`")


def shown(page: str) -> list[LMConfig | PPOConfig | PreferenceConfig | RewardConfig | RolloutConfig]:
    """The configs in the Python of a page."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL))
    return [eval(line, dict(CONFIGS)) for line in code.splitlines()]


def offered(kind: type, field: str) -> set[str]:
    """The values that a field of a config can have."""
    return set(typing.get_args(typing.get_type_hints(kind)[field]))


def missing(reference: str) -> bool:
    """Whether a dotted name of the package is of nothing, or a file, or a test in a file, does not exist."""
    if reference.startswith("palm_rlhf."):
        module, _, name = reference.rpartition(".")
        return not hasattr(importlib.import_module(module), name)
    file, _, test = reference.partition("::")
    path = ROOT / file
    return not path.exists() or (bool(test) and f"def {test}(" not in path.read_text(encoding="utf-8"))


def test_every_algorithm_on_offer_has_a_page():
    configs = [config for page in PAGES for config in shown(page)]
    rlhf = [config for config in configs if isinstance(config, PPOConfig)]
    names = {config.grpo_variant if config.algorithm == "grpo" else config.algorithm for config in rlhf}
    assert names == offered(PPOConfig, "algorithm") | offered(PPOConfig, "grpo_variant") == set(VARIANTS)
    for kind, field in ((PreferenceConfig, "loss"), (RewardConfig, "loss"), (LMConfig, "optimizer")):
        assert {getattr(config, field) for config in configs if isinstance(config, kind)} == offered(kind, field)


def test_the_index_leads_to_every_page():
    assert sorted(re.findall(r"\((\w+)\.md\)", INDEX)) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_formula_source_functions_and_tests(page):
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGES[page], re.MULTILINE | re.DOTALL))
    assert r"\[" in parts["Formula"] and re.search(r"arXiv:\d|\b(19|20)\d\d\b", parts["Source"])
    functions = re.findall(r"\]\[([\w.]+)\]", parts["Functions"])
    tests = TEST.findall(parts["Tests"])
    assert functions and tests
    assert [reference for reference in functions + tests if missing(reference)] == []


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "## Values" in text])
def test_the_values_on_a_page_are_those_of_the_config(page):
    values = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGES[page], re.MULTILINE))
    (config,) = shown(page)
    assert values == {name: str(getattr(config.variant, name)) for name in values} != {}


@pytest.mark.parametrize("reference", ["tests/none.py", "tests/test_docs.py::test_none", "palm_rlhf.ops.masked.none"])
def test_what_does_not_exist_is_found(reference):
    assert missing(reference)
    assert not missing("tests/test_docs.py::test_what_does_not_exist_is_found")
    assert not missing("palm_rlhf.ops.masked.masked_mean")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_that_are_named_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [found for found in FILE.findall(text) + TEST.findall(text) if missing(found)] == []
    assert [link for link in re.findall(r"\]\(([^):#]+)\)", text) if not (ROOT / link).exists()] == []


@pytest.fixture(scope="module")
def hooks():
    """The module that makes the site's pages of what lies elsewhere."""
    for package in ("mkdocs", "latex2mathml"):
        pytest.importorskip(package, reason="needs the extra docs: pip install -e '.[docs]'")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_on_the_site_once_and_in_its_order(hooks):
    pages = hooks.readme_pages()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index, *guide = pages.values()
    assert index + "".join(page.replace("# ", "## ", 1) for page in guide) == readme
    assert all(page.startswith("# ") and hooks.title_of(page) == page.splitlines()[0][2:] for page in guide)


@pytest.mark.parametrize(
    "link, expected",
    [
        ("[a](#second)", "[a](second.md#second)"),
        ("[a](benchmarks/README.md#figures)", "[a](../benchmarks.md#figures)"),
        ("[a](docs/algorithms/ppo.md)", "[a](../algorithms/ppo.md)"),
        ("![a](examples/chat.png)", "![a](../examples/chat.png)"),
        ("[a](https://arxiv.org/abs/1707.06347)", "[a](https://arxiv.org/abs/1707.06347)"),
        ("[a](palm_rlhf/ops)", "a"),
        ("```text\n[a](#second)\n```", "```text\n[a](#second)\n```"),
    ],
)
def test_links_lead_to_the_pages_of_the_site(hooks, link, expected):
    assert hooks.with_links(link, "guide/first.md", "README.md", {"second": "guide/second.md"}) == expected


def test_every_module_is_in_the_reference(hooks):
    shown = set(re.findall(r"^::: ([\w.]+)$", "\n".join(hooks.reference_pages().values()), re.MULTILINE))
    files = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / "palm_rlhf").rglob("*.py")}
    assert shown == {".".join(file.parts) for file in files if not file.name.startswith("_")}


def test_formulas_become_mathml(hooks):
    shown = hooks.on_page_content('<p><span class="arithmatex">\\(x &lt; y_1\\)</span></p>')
    assert "<math" in shown and "<msub>" in shown and "arithmatex" not in shown
    block = hooks.on_page_content('<div class="arithmatex">\\[\\frac{1}{2}\\]</div>')
    assert "<mfrac>" in block and 'display="block"' in block
