"""Short questions with known answers, and a check of answers to them: the gold score of examples/rlhf_pretrained.py."""

import itertools
import random
import re
import unicodedata
from dataclasses import dataclass

# country: capital; continent; language. Countries with several official languages or continents are left out.
COUNTRIES = """
Albania: Tirana; Europe; Albanian
Angola: Luanda; Africa; Portuguese
Argentina: Buenos Aires; South America; Spanish
Austria: Vienna; Europe; German
Bangladesh: Dhaka; Asia; Bengali
Brazil: Brasilia; South America; Portuguese
Bulgaria: Sofia; Europe; Bulgarian
Cambodia: Phnom Penh; Asia; Khmer
Chile: Santiago; South America; Spanish
China: Beijing; Asia; Chinese, Mandarin
Colombia: Bogota; South America; Spanish
Croatia: Zagreb; Europe; Croatian
Cuba: Havana; North America; Spanish
Denmark: Copenhagen; Europe; Danish
Ecuador: Quito; South America; Spanish
Egypt: Cairo; Africa; Arabic
Estonia: Tallinn; Europe; Estonian
Ethiopia: Addis Ababa; Africa; Amharic
Finland: Helsinki; Europe; Finnish
France: Paris; Europe; French
Germany: Berlin; Europe; German
Ghana: Accra; Africa; English
Greece: Athens; Europe; Greek
Hungary: Budapest; Europe; Hungarian
Iceland: Reykjavik; Europe; Icelandic
India: New Delhi, Delhi; Asia; Hindi
Indonesia: Jakarta; Asia; Indonesian
Iran: Tehran; Asia; Persian, Farsi
Iraq: Baghdad; Asia; Arabic
Italy: Rome; Europe; Italian
Jamaica: Kingston; North America; English
Japan: Tokyo; Asia; Japanese
Jordan: Amman; Asia; Arabic
Kenya: Nairobi; Africa; Swahili
Latvia: Riga; Europe; Latvian
Lebanon: Beirut; Asia; Arabic
Lithuania: Vilnius; Europe; Lithuanian
Mexico: Mexico City; North America; Spanish
Mongolia: Ulaanbaatar, Ulan Bator; Asia; Mongolian
Morocco: Rabat; Africa; Arabic
Mozambique: Maputo; Africa; Portuguese
Nepal: Kathmandu; Asia; Nepali
Nigeria: Abuja; Africa; English
Norway: Oslo; Europe; Norwegian
Peru: Lima; South America; Spanish
Poland: Warsaw; Europe; Polish
Portugal: Lisbon; Europe; Portuguese
Romania: Bucharest; Europe; Romanian
Saudi Arabia: Riyadh; Asia; Arabic
Senegal: Dakar; Africa; French
Serbia: Belgrade; Europe; Serbian
Slovakia: Bratislava; Europe; Slovak
South Korea: Seoul; Asia; Korean
Spain: Madrid; Europe; Spanish
Sweden: Stockholm; Europe; Swedish
Syria: Damascus; Asia; Arabic
Thailand: Bangkok; Asia; Thai
Tunisia: Tunis; Africa; Arabic
Uganda: Kampala; Africa; English
Ukraine: Kyiv, Kiev; Europe; Ukrainian
Uruguay: Montevideo; South America; Spanish
Venezuela: Caracas; South America; Spanish
Vietnam: Hanoi; Asia; Vietnamese
Zambia: Lusaka; Africa; English
"""
# question: the accepted names of the fact.
TRIVIA = """
Who wrote Hamlet?: Shakespeare
Who wrote Pride and Prejudice?: Austen
Who wrote The Hobbit?: Tolkien
Who wrote Don Quixote?: Cervantes
Who wrote War and Peace?: Tolstoy
Who wrote The Odyssey?: Homer
Who painted the Mona Lisa?: Leonardo, da Vinci
Who painted The Starry Night?: van Gogh
Who composed the Moonlight Sonata?: Beethoven
Who composed The Magic Flute?: Mozart
Who discovered penicillin?: Fleming
Who discovered radium?: Curie
Who developed the theory of relativity?: Einstein
Who developed the theory of evolution?: Darwin
Who invented the telephone?: Bell
Who invented the light bulb?: Edison
Who was the first president of the United States?: Washington
Who was the first person to walk on the Moon?: Armstrong
What is the largest planet in the solar system?: Jupiter
What is the chemical symbol of gold?: Au
What is the chemical symbol of iron?: Fe
What is the chemical symbol of silver?: Ag
What is the chemical formula of water?: H2O
What is the tallest mountain on Earth?: Everest
What is the largest ocean on Earth?: Pacific
What is the longest river in Africa?: Nile
What is the largest desert in Africa?: Sahara
What is the largest animal on Earth?: blue whale
What is the hardest natural material?: diamond
What is the currency of Japan?: yen
What is the currency of the United States?: dollar
What do bees make?: honey
What is the opposite of hot?: cold
Which planet is called the Red Planet?: Mars
Which star is at the centre of the solar system?: Sun
Which gas do plants take from the air?: carbon dioxide, CO2
Which organ pumps blood through the body?: heart
Which country has the Great Wall?: China
Which country has the Pyramids of Giza?: Egypt
Which city has the Eiffel Tower?: Paris
"""

KINDS = {
    "capital": "What is the capital of {}?",
    "continent": "On which continent is {}?",
    "language": "Which language is spoken in {}?",
}
LONGEST_SHORT = 12  # words of a short sentence
FEWEST = 3  # words of a sentence, as in "It is Paris."
VERBS = frozenset(
    "is are was were has have had lies uses use speak speaks belongs means make makes produce produces pump pumps take "
    "takes absorb absorbs wrote painted composed discovered developed invented walked became".split()
)


@dataclass(frozen=True)
class Question:
    """A question, what it is about, the accepted names of its fact, and facts that would be wrong answers to it."""

    text: str
    subject: str
    answers: tuple[str, ...]
    wrong: frozenset[str] = frozenset()


def read_questions() -> list[Question]:
    """Return all questions: three about each country, then the others."""
    table = {}
    for line in COUNTRIES.strip().splitlines():
        country, facts = line.split(": ")
        table[country] = [tuple(names.split(", ")) for names in facts.split("; ")]
    all_names = [{name for names in column for name in names} for column in zip(*table.values(), strict=True)]
    questions = [
        Question(form.format(country), country, names, frozenset(every - set(names)))
        for country, facts in table.items()
        for form, names, every in zip(KINDS.values(), facts, all_names, strict=True)
    ]
    for line in TRIVIA.strip().splitlines():
        text, names = line.split("?: ")
        questions.append(Question(f"{text}?", f"{text}?", tuple(names.split(", "))))
    return questions


def hold_out(questions: list[Question], num_subjects: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Return the questions for training and the held-out ones, which are about other countries and things."""
    subjects = sorted({question.subject for question in questions})
    unseen = set(random.Random(seed).sample(subjects, num_subjects))
    sides: tuple[list[Question], list[Question]] = ([], [])
    for question in questions:
        sides[question.subject in unseen].append(question)
    return sides


def names_fact(question: Question, answer: str) -> bool:
    """Return whether an answer has an accepted name of the fact, and no wrong one; case and accents do not matter.

    A list of guesses, with the right one among them, does not name the fact.
    """
    words = f" {' '.join(words_of(answer))} "

    def has(name: str) -> bool:
        return f" {' '.join(words_of(name))} " in words

    return any(map(has, question.answers)) and not any(map(has, question.wrong))


def is_sentence(answer: str) -> bool:
    """Return whether an answer is one whole sentence, with a verb, from its capital letter to its full stop.

    A second sentence, a second line, or a word twice in a row do not belong to it.
    """
    words = words_of(answer)
    return (
        re.fullmatch(r"[^\W\d_a-z][^.!?\n]*[^\W_][.!]", answer) is not None
        and len(words) >= FEWEST
        and not VERBS.isdisjoint(words)
        and all(one != two for one, two in itertools.pairwise(words))
    )


def gold_score(question: Question, answer: str, ended: bool) -> float:
    """Return the gold score of an answer, from 0 to 1: whether it is one short sentence that names the fact.

    An answer that was cut off (`ended` is False), is not one sentence, or does not name the fact has 0. Others have 1,
    and less beyond `LONGEST_SHORT` words: half for twice as many.
    """
    if not (ended and is_sentence(answer) and names_fact(question, answer)):
        return 0.0
    return min(1.0, LONGEST_SHORT / len(words_of(answer)))


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case without accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"\w+", "".join(letter for letter in plain if not unicodedata.combining(letter)))
