"""Agreement between people: Krippendorff's alpha and Kendall's tau."""

import math
from itertools import permutations

import numpy as np
import pytest

from palm_rlhf.feedback.measures.agreement import label_agreement, ranking_agreement, tau_of, vote_agreement
from palm_rlhf.feedback.measures.krippendorff_alpha import krippendorff_alpha
from palm_rlhf.feedback.measures.vote_records import VoteRecord
from palm_rlhf.feedback.store.learning_tables import Withdrawal
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Tree, TreeMessage
from tests.feedback.comparing import NEW, NOW, OLD, add_person

# The examples of Krippendorff (2011): sections A and B, and C with labels that are missing.
MEG_AND_OWEN = ("0100000010", "1110010000")
BEN_AND_GERRY = ("aabbdcccedda", "babbbccceddd")
FOUR_OBSERVERS = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


def labels(rows):
    return [(unit, int(label)) for row in rows for unit, label in enumerate(row) if label != "."]


@pytest.mark.parametrize(
    "rows, scale, expected",
    [
        (MEG_AND_OWEN, "nominal", 0.095),
        (BEN_AND_GERRY, "nominal", 0.692),
        (FOUR_OBSERVERS, "nominal", 0.743),
        (FOUR_OBSERVERS, "ordinal", 0.815),
        (FOUR_OBSERVERS, "interval", 0.849),
    ],
)
def test_the_published_examples_of_alpha(rows, scale, expected):
    rows = [row.translate(str.maketrans("abcde", "12345")) for row in rows]
    assert krippendorff_alpha(labels(rows), scale) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("scale", ["nominal", "interval"])
def test_alpha_is_the_ratio_of_mean_differences_of_pairs(scale):
    rng = np.random.default_rng(1)
    given = [(unit, int(rng.integers(3)) + unit % 2) for unit in range(12) for _ in range(3)]  # 3 labels of each unit
    distance = (lambda a, b: float(a != b)) if scale == "nominal" else (lambda a, b: float(a - b) ** 2)
    within = [
        distance(a, b)
        for unit in range(12)
        for a, b in permutations([label for other, label in given if other == unit], 2)
    ]
    anyhow = [distance(a, b) for a, b in permutations([label for _, label in given], 2)]
    assert krippendorff_alpha(given, scale) == pytest.approx(1 - np.mean(within) / np.mean(anyhow))


def test_alpha_at_its_ends():
    assert krippendorff_alpha([(1, 0), (1, 0), (2, 1), (2, 1)], "nominal") == 1.0
    assert krippendorff_alpha([(1, 0), (1, 0), (2, 0), (2, 0), (3, 1)], "nominal") is None  # one label among pairs
    assert krippendorff_alpha([(1, 0), (2, 1)], "ordinal") is None
    assert krippendorff_alpha([], "interval") is None
    assert krippendorff_alpha([(1, 0), (1, 1), (2, 1), (2, 0)], "nominal") == pytest.approx(-0.5)


def test_tau_counts_pairs_in_the_same_order():
    assert tau_of([list("abcd"), list("abcd")]) == pytest.approx(1)
    assert tau_of([list("abcd"), list("abdc")]) == pytest.approx((5 - 1) / 6)
    assert tau_of([list("abc"), list("cba")]) == pytest.approx(-1)
    assert tau_of([list("abc"), list("xcay")]) == pytest.approx(-1)  # by a and c alone
    assert tau_of([list("ab"), list("ab"), list("ba")]) == pytest.approx((1 - 1 - 1) / 3)
    assert tau_of([list("ab"), list("cd")]) is None and tau_of([list("ab")]) is None


def tree_of(session):
    tree = Tree(language="en", state="growing", created_at=NOW)
    session.add(tree)
    session.flush()
    return tree


def message_of(session, tree, text):
    message = TreeMessage(tree_id=tree.id, role="assistant", text=text, language="en", depth=0, created_at=NOW)
    session.add(message)
    session.flush()
    return message


def test_labels_and_rankings_are_read_from_the_database(store):
    with store.writing() as session:
        tree = tree_of(session)
        messages = [message_of(session, tree, text) for text in "xyz"]
        people = [add_person(session, name) for name in ("Ann", "Bob", "Cem")]
        spam, quality = ((0, 0, 1), (1, 1, 0), (0, 1, 1)), ((0.25, 0.5, 0.75), (0.5, 0.5, 0.0), (1.0, 0.75, 0.0))
        for message, flags, scales in zip(messages, spam, quality):
            for person, flag, scale in zip(people, flags, scales):
                values = {"spam": flag} | ({} if message == messages[0] else {"quality": scale})
                row = MessageReview(message_id=message.id, person_id=person.id, labels=values, created_at=NOW)
                session.add(row)
                session.flush()
                if (message, person) == (messages[2], people[2]):
                    session.add(Withdrawal(table="reviews", row_id=row.id))
        orders = {"Ann": "abc", "Bob": "acb", "Cem": "cba"}
        for message in messages[:2]:
            for person in people if message == messages[0] else people[:2]:
                order = list(orders[person.name])
                session.add(ReplyRanking(parent_id=message.id, person_id=person.id, shown=order, best_first=order))
        session.flush()
        by_label = {each.label: each for each in label_agreement(session)}
        ranked = ranking_agreement(session)
    assert set(by_label) == {"spam", "quality"}
    expected = krippendorff_alpha([(0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (1, 0), (2, 0), (2, 1)], "nominal")
    assert by_label["spam"].alpha == pytest.approx(expected) and by_label["spam"].num_shared == 3
    assert (by_label["quality"].scale, by_label["quality"].num_shared) == ("ordinal", 2)
    first, second = (1 / 3 - 1 - 1 / 3) / 3, 1 / 3  # abc with acb, abc with cba, acb with cba; abc with acb
    assert ranked.tau == pytest.approx((first + second) / 2)
    assert (ranked.num_sets, ranked.num_rankings) == (2, 5)
    assert (ranked.low, ranked.high) == pytest.approx((first, second))


def test_votes_agree_whichever_side_an_answer_was_on():
    def vote(person, left, right, verdict):
        return VoteRecord(person, "p", left, right, OLD, NEW, verdict, "training", None)

    votes = [
        vote("Ann", "a", "b", "left"),
        vote("Bob", "b", "a", "right"),  # the same
        vote("Ann", "c", "d", "tie"),
        vote("Bob", "c", "d", "both_bad"),  # the same
        vote("Ann", "e", "f", "left"),
        vote("Bob", "e", "f", "right"),
        vote("Bob", "g", "h", "left"),  # alone
    ]
    found = vote_agreement(votes)
    assert found.share == pytest.approx(2 / 3) and found.num_shared == 3
    # Verdicts from both sides: 1 1, 0 0, 1/2 1/2 twice, 1 0 twice. Four ordered pairs of them differ, by 1 each. Over
    # all ordered pairs of 4 ones, 4 zeros and 4 halves, the squares are 2 * 16 * 1 + 4 * 16 / 4 = 48.
    assert found.alpha == pytest.approx(1 - 4 / (48 / 11))
    turned = [vote._replace(left_id=vote.right_id, right_id=vote.left_id) for vote in votes]
    assert vote_agreement(turned).alpha == pytest.approx(found.alpha)
    assert vote_agreement(votes[:1]).alpha is None and not math.isnan(found.alpha)
