"""The texts of the pages: English in the templates, other languages in message catalogues."""

from io import BytesIO
from pathlib import Path

from babel import Locale, UnknownLocaleError, negotiate_locale
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from babel.support import NullTranslations, Translations

SOURCE = "en"


def N_(text: str) -> str:  # gettext's own name for it, which Babel looks for
    """Mark a text for the catalogues, and return it as it is; a template translates it where it is shown."""
    return text


class Catalogues:
    """Translations by language, read from files `LANGUAGE.po`."""

    def __init__(self, folder: Path):
        self._translations: dict[str, NullTranslations] = {SOURCE: NullTranslations()}
        for path in sorted(folder.glob("*.po")):
            with path.open("rb") as file:
                catalogue = read_po(file, locale=path.stem)
            compiled = BytesIO()
            write_mo(compiled, catalogue)
            compiled.seek(0)
            self._translations[path.stem] = Translations(compiled)

    def __getitem__(self, language: str) -> NullTranslations:
        """Return the translations into a language."""
        return self._translations[language]

    @property
    def names(self) -> dict[str, str]:
        """The languages of the pages, each with its own name."""
        return {language: self.name_of(language) for language in self._translations}

    @staticmethod
    def name_of(language: str, reader: str | None = None) -> str:
        """Return the name of a language in a reader's language, or in itself; its code where Babel does not know it."""
        try:
            return Locale.parse(language, sep="-").get_display_name(reader) or language
        except (UnknownLocaleError, ValueError):
            return language

    def choose(self, *wishes: str | None) -> str:
        """Return the language of the first wish that can be met; a wish is a language or an Accept-Language header."""
        for wish in filter(None, wishes):
            preferred = [part.partition(";")[0].strip() for part in wish.split(",")]
            if found := negotiate_locale(preferred, list(self._translations), sep="-"):
                return found
        return SOURCE

    @staticmethod
    def direction(language: str) -> str:
        """Return rtl for a language that is written from right to left, or ltr."""
        try:
            return Locale.parse(language, sep="-").text_direction
        except (UnknownLocaleError, ValueError):
            return "ltr"
