"""Pages of the documentation whose source is elsewhere, and formulas as MathML, which browsers show by themselves.

Each section of the README is a page. So are the other texts of the checkout that it links to, and the docstrings of
each folder of the package.
"""

import ast
import html
import posixpath
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "palm_rlhf"
ALGORITHMS = ROOT / "docs/algorithms"
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
TEXTS = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
    "deploy.md": "examples/deploy/README.md",
}


def slug(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """A Markdown text, of which all but the fenced blocks is changed."""
    ends = [(0, 0), *(block.span() for block in FENCED.finditer(text)), (len(text), len(text))]
    parts = []
    for (_, before), (start, end) in pairwise(ends):
        parts += [change(text[before:start]), text[start:end]]
    return "".join(parts)


def sections(text: str) -> list[tuple[str, str]]:
    """The title and text of each part of the README: what stands before the second level, then its sections."""
    hidden = FENCED.sub(lambda block: re.sub(r"[^\n]", "x", block[0]), text)
    starts = [match.start() for match in re.finditer(r"^## ", hidden, re.MULTILINE)]
    parts = [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True)]
    return [(part.splitlines()[0].lstrip("# "), part) for part in parts]


def readme_pages() -> dict[str, str]:
    """The README's pages, by their names in its order: the first has the introduction and how to start."""
    (_, introduction), (_, start), *others = sections((ROOT / "README.md").read_text(encoding="utf-8"))
    pages = {"index.md": introduction + start}
    return pages | {f"guide/{slug(title)}.md": text.replace("## ", "# ", 1) for title, text in others}


def homes(pages: dict[str, str]) -> dict[str, str]:
    """The page of each heading of the README, by its anchor."""
    titles = {name: re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE) for name, text in pages.items()}
    return {slug(title): name for name, found in titles.items() for title in found}


def with_links(text: str, page: str, source: str, anchors: dict[str, str]) -> str:
    """The text with its links led to the site's pages; what the site does not have is named without a link."""

    def lead(match: re.Match) -> str:
        image, label, target = match["image"], match["text"], match["target"]
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        if not path:
            return (
                f"[{label}]({relative(anchors.get(anchor, page), page)}#{anchor})"
                if source == "README.md"
                else match[0]
            )
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path == "README.md":
            return f"[{label}]({relative(anchors.get(anchor, 'index.md'), page)}{'#' * bool(anchor)}{anchor})"
        if image:
            return f"![{label}]({relative(path, page)})"
        names = {origin: name for name, origin in TEXTS.items()}
        name = path.removeprefix("docs/") if path.startswith("docs/") else names.get(path)
        return label if name is None else f"[{label}]({relative(name, page)}{'#' * bool(anchor)}{anchor})"

    return outside_code(text, lambda part: LINK.sub(lead, part))


def relative(target: str, page: str) -> str:
    """A path of the site as a page links to it."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def packages() -> list[Path]:
    """The folders of the package that hold modules, each before those in it."""
    return sorted({path.parent for path in PACKAGE.rglob("*.py")}, key=lambda path: path.relative_to(PACKAGE).parts)


def reference_page(folder: Path) -> str:
    """The page of a folder: its own docstring, then all that is public in each of its modules."""
    name = ".".join(folder.relative_to(ROOT).parts)
    summary = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    modules = [path.stem for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]
    return "\n\n".join([f"# {name}", summary, *(f"::: {name}.{module}" for module in modules)])


def reference_pages() -> dict[str, str]:
    """The pages of the reference, by their names."""
    return {f"reference/{'.'.join(path.relative_to(ROOT).parts)}.md": reference_page(path) for path in packages()}


def title_of(text: str) -> str:
    """The first heading of a page."""
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1]


def on_config(config: MkDocsConfig) -> None:
    """The order of the pages: the README's, the algorithms', the reference."""
    algorithms = [f"algorithms/{line}" for line in re.findall(r"\((\w+\.md)\)", (ALGORITHMS / "index.md").read_text())]
    index, *guide = readme_pages()
    config.nav = [
        {"Start": index},
        {"Guide": [{title_of(text): name} for name, text in readme_pages().items() if name in guide]},
        {"Algorithms": ["algorithms/index.md", *algorithms]},
        {"Reference": [{title_of(text): name} for name, text in reference_pages().items()]},
        {"Project": list(TEXTS)},
    ]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages that are no files of docs/, and the pictures that they show."""
    readme = readme_pages()
    anchors = homes(readme)
    texts = {name: (ROOT / source).read_text(encoding="utf-8") for name, source in TEXTS.items()}
    sources = {**dict.fromkeys(readme, "README.md"), **TEXTS}
    for name, text in {**readme, **texts}.items():
        content = with_links(text, name, sources[name], anchors)
        files.append(File.generated(config, name, content=content))
        for image in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text):
            if "://" not in image:
                path = posixpath.normpath(posixpath.join(posixpath.dirname(sources[name]), image))
                if files.get_file_from_path(path) is None:
                    files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for name, text in reference_pages().items():
        files.append(File.generated(config, name, content=text))


def on_page_content(page_html: str, **_) -> str:
    """Formulas as MathML."""

    def formula(match: re.Match) -> str:
        _, bracket, tex = match.groups()
        return convert(html.unescape(tex), display="block" if bracket == "[" else "inline")

    return FORMULA.sub(formula, page_html)
