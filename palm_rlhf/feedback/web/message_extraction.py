"""The texts of the pages as their sources have them, and the update of the catalogues:

    python -m palm_rlhf.feedback.web.message_extraction

Texts are those of `_()` and `ngettext()` in templates, of `N_()` in Python, and the messages of FeedbackError that are
written out where they are raised.
"""

from contextlib import redirect_stderr
from io import BytesIO, StringIO
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.extract import DEFAULT_KEYWORDS, extract_from_dir
from babel.messages.pofile import read_po, write_po

ROOM = Path(__file__).parents[1]
LOCALES = Path(__file__).parent / "locales"
METHODS = [("**.py", "python"), ("**/templates/**.html", "jinja2")]
OPTIONS = {"**/templates/**.html": {"trim_blocks": "true", "lstrip_blocks": "true", "silent": "false"}}
KEYWORDS = {**DEFAULT_KEYWORDS, "FeedbackError": None}
WIDTH = 120
HEADER = r"""msgid ""
msgstr ""
"Language: {language}\n"
"MIME-Version: 1.0\n"
"Content-Type: text/plain; charset=utf-8\n"
"Content-Transfer-Encoding: 8bit\n"
"Plural-Forms: {plural_forms}\n"

"""


def source_messages() -> Catalog:
    """Return the texts of the sources, sorted by file."""
    catalogue = Catalog()
    with redirect_stderr(StringIO()):  # notes on errors with f-strings, which are for programs and stay English
        found = sorted(extract_from_dir(str(ROOM), METHODS, OPTIONS, KEYWORDS), key=lambda each: each[:2])
    for file, line, message, _, context in found:
        catalogue.add(message, locations=[(file, line)], context=context)
    return catalogue


def read_catalogue(path: Path) -> Catalog:
    """Return the catalogue of a file `LANGUAGE.po`."""
    with path.open("rb") as file:
        return read_po(file, locale=path.stem)


def write_catalogue(path: Path, catalogue: Catalog) -> None:
    """Write a catalogue, with the header that other programs for such files need and nothing that changes by itself."""
    text = BytesIO()
    write_po(text, catalogue, width=WIDTH, no_location=True, omit_header=True, ignore_obsolete=True)
    header = HEADER.format(language=path.stem, plural_forms=catalogue.plural_forms)
    path.write_text(header + text.getvalue().decode(), encoding="utf-8")


def update(path: Path, source: Catalog) -> list[str]:
    """Bring a catalogue's file up to date: new texts without a translation, none that the sources no longer have.

    Return the texts that wait for a translation.
    """
    catalogue = read_catalogue(path)
    catalogue.update(source, no_fuzzy_matching=True, update_creation_date=False)
    write_catalogue(path, catalogue)
    return [str(message.id) for message in catalogue if message.id and not message.string]


def main() -> None:
    """Update all catalogues, and print what waits for a translation."""
    source = source_messages()
    for path in sorted(LOCALES.glob("*.po")):
        waiting = update(path, source)
        print(f"{path.name}: {len(source)} texts, {len(waiting)} without a translation")
        for text in waiting:
            print(f"    {text}")


if __name__ == "__main__":
    main()
