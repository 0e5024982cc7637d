"""From people to a better model, as a user goes: in a real browser, and by the commands.

Two people do all tasks and compare answers on a running `palm-rlhf collect`, while `palm-rlhf learn` waits for them.
"""

import json
import math
import re
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from sqlalchemy import select

from palm_rlhf.data.conversation import encode
from palm_rlhf.data.templates import load_template
from palm_rlhf.data.tokenizer import load_tokenizer
from palm_rlhf.feedback.store.answer_tables import Answer, KnownModel
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.tree_tables import Task
from palm_rlhf.policy.reward_model import RewardModel
from tests.feedback.taste import PROMPTS, liking, save_chat_model

KINDS = {"write_prompt", "label_prompt", "reply_as_user", "reply_as_assistant", "label_reply", "rank_replies"}
PASSWORD = "correct horse battery"
SETTINGS = """--num-reviews 1 --num-rankings 1 --max-children 1 --max-open-trees 4 --max-tree-size 5 --max-depth 3
    --max-new-tokens 8""".split()
LEARNING = """--votes 20 --num-prompts 24 --num-answers 3 --num-evaluations 6 --max-new-tokens 8 --max-seq-len 64
    --reward-epochs 4 --reward-batch-size 8 --reward-learning-rate 1e-2 --pooling mean --num-steps 2
    --rollouts-per-step 16 --minibatch-size 8 --epochs 1 --learning-rate 3e-3""".split()
FITTING = """--pooling mean --held-out 0 --batch-size 8 --grad-accum 1 --num-epochs 6 --learning-rate 1e-2
    --max-seq-len 64 --warmup-steps 5""".split()


def palm_rlhf(*arguments) -> list[str]:
    return [sys.executable, "-c", "from palm_rlhf.cli import main; main()", *map(str, arguments)]


@contextmanager
def running(log, *arguments):
    """A command of palm-rlhf in a process of its own, which is ended at the end of the block."""
    with log.open("w") as errors:
        process = subprocess.Popen(palm_rlhf(*arguments), stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def last_line(*arguments) -> dict:
    done = subprocess.run(palm_rlhf(*arguments), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def score(folder, reply) -> float:
    """The score of a reply by the reward model in a folder."""
    tokenizer, template = load_tokenizer(folder), load_template(folder)
    example = encode([*PROMPTS[0], {"role": "assistant", "content": reply}], tokenizer, template)
    reward_model = RewardModel.from_pretrained(folder)
    return reward_model(example.tokens[None].long(), prompt_mask=example.weights[None] == 0).item()


class Person:
    """A person in a tab of the browser; tabs of different host names share no cookies."""

    def __init__(self, browser, url, letter):
        browser.switch_to.new_window("tab")
        self.browser, self.url, self.tab, self.letter = browser, url, browser.current_window_handle, letter
        self.written = 0
        self.preferred = []  # pairs of texts, the liked one first
        self.num_ranked_pairs = 0

    def open(self, path):
        self.browser.switch_to.window(self.tab)
        self.browser.get(f"{self.url}{path}")

    def find(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def press(self, selector):
        """Press a button, and wait for the page that follows."""
        self.browser.execute_script("document.getElementById('main').dataset.old = ''")
        self.find(selector)[0].click()
        wait_until(lambda: self.find("#main:not([data-old])"), lambda: self.find("body")[0].text)

    def fill(self, **fields):
        for name, text in fields.items():
            self.find(f"[name={name}]")[0].send_keys(text)

    def do_a_task(self):
        """Do the next task, if there is one, and return whether there was."""
        self.open("")
        if not self.find("[data-key=n]"):
            return False
        self.press("[data-key=n]")
        if area := self.find("#text"):
            self.written += 1
            area[0].send_keys(f"add {self.written}{self.letter}?")
        for name in ("spam", "lang_mismatch"):
            for choice in self.find(f"[name={name}][value='0']"):
                choice.click()
        if cards := self.find(".ranking li"):
            self.rank(cards)
        if self.find("form.task"):
            self.press("[data-sends]")
        return True

    def rank(self, cards):
        """Put the replies in order by the keys, the liked ones first."""
        self.num_ranked_pairs += math.comb(len(cards), 2)
        best_first = sorted(cards, key=lambda card: -liking(card.find_element(By.CSS_SELECTOR, ".text").text))
        for place, card in enumerate(best_first):
            while self.find(".ranking li").index(card) > place:
                card.send_keys(Keys.ARROW_UP)

    def compare(self, purpose_only=None):
        """Vote for the answer that is liked more, and return the two texts; None if there is no pair."""
        if not self.find("form.comparison"):
            return None
        left, right = (text.get_attribute("textContent") for text in self.find("form.comparison .side .text"))
        verdict = "tie" if liking(left) == liking(right) else "left" if liking(left) > liking(right) else "right"
        if verdict != "tie":
            self.preferred.append(sorted([left, right], key=liking, reverse=True))
        self.press(f"[name=verdict][value={verdict}]")
        return left, right


def wait_until(is_so, why=lambda: "", seconds=60):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)


def as_letters(texts):
    """The letters of two answers, in any order; the page shows texts as Markdown, which has its own spaces."""
    return sorted("".join(filter(str.isalnum, text)) for text in texts)


def log_in(browser, address):
    """The admin, by the password of the set-up, and somebody whom the admin has invited."""
    ada = Person(browser, address, "a")
    ada.open("login")
    ada.fill(name="admin", password=PASSWORD)
    ada.find("form[action$='/login'] button")[0].click()
    wait_until(lambda: "/login" not in browser.current_url)
    ada.open("people")
    ada.press("form[action$='/people/invite'] button")
    secret = ada.find("#invitation")[0].get_attribute("value").rpartition("/")[2]
    bob = Person(browser, address.replace("127.0.0.1", "localhost"), "b")
    bob.open(f"join/{secret}")
    bob.fill(name="Bob", password=PASSWORD, again=PASSWORD)
    bob.find("form[action$='/join'] button")[0].click()
    wait_until(lambda: "/join" not in browser.current_url, lambda: bob.find("body")[0].text)
    return ada, bob


def kinds_done(store):
    with store.reading() as session:
        done = session.scalars(select(Task).where(Task.outcome == "done")).all()
    people = {task.person_id for task in done}
    return [{task.kind for task in done if task.person_id == person} for person in people]


@pytest.mark.slow(60)
def test_two_people_grow_trees_and_compare_and_a_model_learns_from_them(browser, tmp_path):
    model, database = save_chat_model(tmp_path / "model"), tmp_path / "feedback.db"
    (tmp_path / "password").write_text(PASSWORD)
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt[0]['content']}\n" for prompt in PROMPTS))
    site = ["collect", model, "--database", f"sqlite:///{database}", "--port", 0, *SETTINGS]
    site += ["--admin-password-file", tmp_path / "password"]
    rounds = ["learn", database, model, "--output-dir", tmp_path / "rounds", "--prompts", tmp_path / "prompts.txt"]
    home = browser.current_window_handle
    with running(tmp_path / "collect.log", *site) as collecting, Store(database) as store:
        address = re.search(r"http://\S+", collecting.stdout.readline())[0].rstrip("/") + "/"
        people = log_in(browser, address)

        def all_tasks_done():
            for person in people:
                person.do_a_task()
            done = kinds_done(store)
            return len(done) == 2 and all(kinds == KINDS for kinds in done)

        wait_until(all_tasks_done, lambda: kinds_done(store), seconds=240)

        with running(tmp_path / "learn.log", *rounds, *LEARNING) as learning:
            for person in people:
                person.open("compare")
                wait_until(lambda who=person: who.find("form.comparison") or who.open("compare"))
                assert all(person.compare() for _ in range(12))

            # while it learns, what people gave so far is exported, read by the data side, and learnt by another command
            out = tmp_path / "preferences.jsonl.gz"
            states = ["--states", "growing", "ranking", "ready_for_export", "exported"]
            exported = last_line("export", database, out, "--to", "preferences", *states)
            preferred = [pair for person in people for pair in person.preferred]
            written = [pair for pair in preferred if all(map(str.strip, pair))]  # readers take no blank replies
            ranked = sum(person.num_ranked_pairs for person in people)  # in trees, of which some have not ended
            assert 0 < len(written) <= exported["preferences"] <= len(preferred) + ranked
            fitted = last_line("reward", out, "--model", model, "--output-dir", tmp_path / "reward", *FITTING)
            assert score(fitted["model"], "aabbccdd") > score(fitted["model"], "eeffgghh")

            result = json.loads(learning.communicate(timeout=240)[0].splitlines()[-1])
        assert result["round"] == 1 and result["comparisons"] == 6

        # the new model's answers stand beside the old one's, and nothing on the page tells which is which
        with store.reading() as session:
            texts, names = {}, {each.id: each.name for each in session.scalars(select(KnownModel))}
            for answer in session.scalars(select(Answer).where(Answer.purpose == "evaluation")):
                texts.setdefault(answer.prompt_key, {})[names[answer.model_id]] = answer.text
        assert all(set(pair) == {"model", "round 1"} for pair in texts.values())
        ada, _ = people
        ada.open("compare")
        shown = [as_letters(pair) for pair in iter(ada.compare, None)]
        assert all(as_letters(pair.values()) in shown for pair in texts.values())
    for person in people:
        browser.switch_to.window(person.tab)
        browser.close()
    browser.switch_to.window(home)
