"""The page of `palm-rlhf inspect`, in a real browser, of a run that was trained here and of records made by hand."""

import json
import math

import pytest
import torch
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from palm_rlhf import PaLM, PPOConfig, RLHFTrainer
from palm_rlhf.cli import main
from palm_rlhf.evaluation.reports.inspection import inspection_page, write_inspection

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror='document.title=1'>$title"
METRICS = [{"step": step, "score": step / 10, "kl": 1.0 + step, "grad_norm": 2.0} for step in (1, 2, 3, 4)]


def row(step: int, pieces: list[str], **lists) -> dict:
    size = len(pieces)
    numbers = {"logprob": [-1.0] * size, "new_logprob": [-0.5] * size, "advantage": [0.0] * size,
               "ratio": [1.0] * size, "clipped": [0] * size, "in_loss": [1] * size}  # fmt: skip
    tokens = [ord(piece[0]) if piece else 0 for piece in pieces]
    return {"step": step, "score": 1.5, "prompt": "Say: ", "tokens": tokens, "pieces": pieces, **numbers, **lists}


def write(folder, rows: list[dict], metrics=METRICS):
    for name, lines in (("tokens", rows), ("metrics", metrics)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def open_run(browser, tmp_path):
    """Opens the page of records in a tab of its own; no script of it may fail or break its policy."""
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")

    def start(rows: list[dict], metrics=METRICS):
        write(tmp_path, rows, metrics)
        browser.get(write_inspection(tmp_path).as_uri())
        return browser

    yield start
    errors = browser.get_log("browser")
    browser.close()
    browser.switch_to.window(first)
    assert errors == []


def tokens(browser):
    return browser.find_elements(By.CSS_SELECTOR, ".token")


def background(token) -> tuple[float, ...]:
    """Red, green, blue and opacity."""
    inside = token.value_of_css_property("background-color").split("(")[1].rstrip(")")
    return tuple(float(number) for number in inside.split(","))


def numbers(browser, token) -> dict[str, str]:
    ActionChains(browser).move_to_element(token).perform()
    box = browser.find_element(By.ID, "numbers")
    assert box.is_displayed()
    lines = box.find_elements(By.TAG_NAME, "tr")
    return {line.find_element(By.TAG_NAME, "th").text: line.find_element(By.TAG_NAME, "td").text for line in lines}


def choose(browser, name: str) -> None:
    browser.find_element(By.CSS_SELECTOR, f"#quantity option[value={name}]").click()


def test_colours_and_numbers_are_those_of_the_records(open_run):
    lists = {"advantage": [2.0, -2.0, 0.0], "ratio": [1.0, 0.5, 2.0], "clipped": [0, 1, 0], "in_loss": [1, 1, 0],
             "logprob": [-1.0, -2.0, -0.5], "ref_logprob": [-1.0, -1.0, -0.5], "value": [3.0, 0.0, 1.0],
             "return": [5.0, 1.0, 1.0]}  # fmt: skip
    browser = open_run([row(2, ["a", "b", "c"], **lists)])
    first, second, third = tokens(browser)
    assert [token.text for token in (first, second, third)] == ["a", "b", "c"]
    orange, blue = background(first), background(second)
    assert orange[0] > orange[2] and blue[2] > blue[0], "encouraged is orange, discouraged is blue"
    assert orange[3] == blue[3] > 0.5, "the same size has the same strength"
    assert "out" in third.get_attribute("class") and background(third)[3] == 0
    assert ["clipped" in token.get_attribute("class") for token in (first, second, third)] == [False, True, False]
    shown = numbers(browser, second)
    assert shown == {"logprob": "-2", "new_logprob": "-0.5", "ref_logprob": "-1", "ratio": "0.5", "advantage": "-2",
                     "value": "0", "return": "1", "KL": "-1", "clipped": "yes"}  # fmt: skip
    assert numbers(browser, third)["in the loss"] == "no"
    choose(browser, "KL")
    first, second, third = tokens(browser)
    assert background(first)[3] == 0 and background(second)[2] > background(second)[0]
    choose(browser, "ratio")
    first, second, third = tokens(browser)
    assert background(first)[3] == 0 and background(second)[2] > background(second)[0]
    choose(browser, "value")
    assert background(tokens(browser)[0])[0] > background(tokens(browser)[0])[2]


def test_scrubbing_goes_through_the_steps_and_along_the_curves(open_run):
    browser = open_run([row(2, ["x"]), row(4, ["y"]), row(4, ["z"])])
    seen = lambda: "".join(token.text for token in tokens(browser))  # noqa: E731
    value = lambda name: browser.execute_script(  # noqa: E731
        "return [...document.querySelectorAll('figcaption')].find(c => c.children[0].textContent === arguments[0])"
        ".children[1].textContent",
        name,
    )
    at = browser.find_element(By.ID, "at")
    assert (at.text, seen(), value("score"), value("kl")) == ("step 4", "yz", "0.4", "5")
    browser.find_element(By.ID, "earlier").click()
    assert (at.text, seen(), value("score"), value("kl")) == ("step 2", "x", "0.2", "3")
    browser.find_element(By.ID, "earlier").click()
    assert at.text == "step 2", "there is none before the first"
    browser.find_element(By.ID, "step").send_keys(Keys.ARROW_RIGHT)
    assert (at.text, seen()) == ("step 4", "yz")
    curve = browser.find_element(By.CSS_SELECTOR, "svg")
    ActionChains(browser).move_to_element_with_offset(curve, -curve.size["width"] // 4, 0).click().perform()
    assert at.text == "step 2", "a quarter of the way is step 2 of 1 to 4"


def test_the_keyboard_reaches_every_token(open_run):
    browser = open_run([row(1, ["a", "b"])])
    tokens(browser)[0].send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.text == "b"
    assert '"b"' in browser.find_element(By.ID, "numbers").text


def test_what_a_policy_writes_is_text(open_run):
    browser = open_run([row(1, [HOSTILE, "\n", "\x1b", "", "é 日本"], prompt=HOSTILE)])
    assert browser.title.startswith("Inside ") and not browser.find_elements(By.CSS_SELECTOR, "main img, main script")
    first, line_break, escape, empty, other = tokens(browser)
    assert first.text == HOSTILE and browser.find_element(By.CLASS_NAME, "prompt").text == HOSTILE
    assert line_break.text.strip() == "⏎" and escape.text == "\\x1b" and empty.text == "⟨0⟩" and other.text == "é 日本"


def test_without_a_tokenizer_ids_are_shown_and_what_is_not_there_is_not_offered(open_run):
    ids = row(1, ["a", "b"], prompt=[5, 6], score=None)
    del ids["pieces"]
    browser = open_run([ids], metrics=[{"step": 1, "score": math.nan, "kl_coef": 0.0}])
    assert [token.text for token in tokens(browser)] == ["⟨97⟩", "⟨98⟩"]
    assert browser.find_element(By.CLASS_NAME, "prompt").text.strip() == "⟨5⟩⟨6⟩"
    assert "no score" in browser.find_element(By.TAG_NAME, "h2").text
    names = [option.text for option in browser.find_elements(By.CSS_SELECTOR, "#quantity option")]
    assert names == ["advantage", "ratio", "surprise"], "there is neither a reference nor a critic"
    assert [name.text for name in browser.find_elements(By.CSS_SELECTOR, "figcaption .name")] == ["kl_coef"]


def test_the_page_of_a_real_run_needs_nothing_but_itself(tmp_path, capsys):
    torch.manual_seed(0)
    trainer = RLHFTrainer(
        palm=PaLM(num_tokens=11, dim=16, depth=1, heads=2, dim_head=8),
        reward_model=lambda prompts, completions: [float(c[0]) for c in completions],
        prompt_token_ids=[torch.tensor([1, 2, 3])],
        config=PPOConfig(
            num_steps=2, rollouts_per_step=4, max_new_tokens=4, sample_every=1, samples_kept=2, plot=False
        ),
        output_dir=tmp_path,
    )
    list(trainer.steps())
    main(["inspect", str(tmp_path), "--output", str(tmp_path / "page.html")])
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page == inspection_page(tmp_path)
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    assert " src=" not in page and "<link" not in page and "default-src 'none'" in page


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "tokens.jsonl is missing or empty; expected the output folder"),
        ([{"step": 1}], r"tokens.jsonl, line 1: got the keys \['step'\]"),
        ([row(1, ["a", "b"], advantage=[1.0])], "line 1: got lists of the lengths"),
        ([row(1, ["a"]), row(1, ["a"], value=[])], "line 2: got lists of the lengths"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, rows, message):
    write(tmp_path, rows)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_inspection(tmp_path)
    assert not (tmp_path / "inspect.html").exists()
