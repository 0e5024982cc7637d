"""The page of comparisons in a real browser, of the size of a phone: by keys alone, with hostile texts, in Arabic."""

from selenium.webdriver import Keys
from selenium.webdriver.common.by import By
from sqlalchemy import select

from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, ShownComparison
from palm_rlhf.feedback.store.learning_tables import Withdrawal
from tests.feedback.comparing import add_answers, add_models, add_round
from tests.feedback.web.test_pages_in_browser import find, is_clean, press, read, wait

HOSTILE = "<img src=x onerror='document.title=1'>"


def test_pairs_are_compared_by_keys_and_the_last_vote_is_taken_back(site, address, screen):
    with site.store.writing() as session:
        add_models(session)
        round_ = add_round(session, 1)
        for number in range(4):
            add_answers(session, round_, f"{number} {HOSTILE}", [f"**good** {HOSTILE}", "bad"])
    page = screen("Ada")
    page.get(f"{address}/compare")

    def votes():
        return [
            verdict for (verdict,) in read(site, select(ComparisonVote.verdict).order_by(ComparisonVote.created_at))
        ]

    def action():
        return page.execute_script("return document.querySelector('form.comparison')?.getAttribute('action')")

    def vote(key, verdict):
        form, number = action(), len(votes())
        assert page.execute_script("return document.querySelectorAll('main img, main script').length") == 0
        assert find(page, ".side strong").text == "good" and HOSTILE in find(page, ".pair").text
        boxes = [side.rect for side in page.find_elements(By.CSS_SELECTOR, ".side")]
        assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]  # below each other
        assert is_clean(page) == (True, [])
        press(page, key)
        wait(page, lambda _: len(votes()) > number and votes()[-1] == verdict)
        wait(page, lambda _: action() != form)

    vote("1", "left")
    vote("0", "tie")
    press(page, "u")
    wait(page, lambda page: "/compare/" in page.current_url and page.find_elements(By.CSS_SELECTOR, "form.comparison"))
    vote("b", "both_bad")
    vote(Keys.ARROW_RIGHT, "right")
    page.get(f"{address}/compare?lang=ar")  # mirrored: the first answer is at the right, and so is its arrow
    vote(Keys.ARROW_RIGHT, "left")
    assert votes() == ["left", "tie", "both_bad", "right", "left"]
    assert len(read(site, select(Withdrawal.id))) == 1
    shown = read(site, select(ShownComparison.left_id, ShownComparison.right_id))
    assert len({frozenset(pair) for pair in shown}) == 4 and len(read(site, select(Answer.id))) == 8
