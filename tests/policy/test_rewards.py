"""What rewards make of responses: one or several, functions and models, and what functions can ask for."""

import asyncio
import functools
import math
import re
import threading

import numpy as np
import pytest
import torch

from palm_rlhf.policy.reward_functions import arguments_of
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rewards import check_rewards, score, weighted_sum
from palm_rlhf.policy.sequences import Sequences, join

EOS = 4
LENGTHS = (3, 1, 6, 2)


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    prompts, responses = ([7, 1], [5], [2, 0, 8]), ([3, 0, EOS], [EOS], [9, 9])
    return join([torch.tensor(prompt) for prompt in prompts], [torch.tensor(response) for response in responses])


def test_a_function_gets_the_tokens_of_each_row(sequences):
    def reward(prompts, completions):
        assert [row.tolist() for row in prompts] == [[7, 1], [5], [2, 0, 8]]
        assert [row.tolist() for row in completions] == [[3, 0, EOS], [EOS], [9, 9]]
        return [0, -0.5, None]  # 0 is a number

    scores, valid, *_ = score(reward, sequences, eos_token=EOS)
    assert scores.dtype == torch.float32 and scores.tolist() == [0.0, -0.5, 0.0]
    assert valid.dtype == torch.bool and valid.tolist() == [True, True, False]


def test_a_function_gets_texts_without_the_eos_where_there_is_a_tokenizer(tokenizer):
    texts = [("Grüß dich", " wie geht's? 你好\n"), ("a", "!"), ("sag nichts", "")]
    encoded = [[torch.tensor(tokenizer.encode(part).ids, dtype=torch.long) for part in row] for row in texts]
    eos = int(tokenizer.encode("!").ids[0])
    closing = torch.tensor([eos])
    rows = join([prompt for prompt, _ in encoded], [torch.cat((said, closing)) for _, said in encoded])
    heard = []

    def reward(prompts, completions):
        heard.append((prompts, completions))
        return [len(completion) for completion in completions]

    prompts = [prompt for prompt, _ in texts]
    scores, _, *_ = score(reward, rows, tokenizer=tokenizer, eos_token=eos)
    assert heard.pop() == (prompts, [said for _, said in texts])  # one EOS alone: "!" of its own stays
    assert scores.tolist() == [len(said) for _, said in texts]
    score(reward, rows, tokenizer=tokenizer)  # without an EOS to look for, it is a token like any other
    assert heard.pop() == (prompts, [said + "!" for _, said in texts])
    score(reward, join([torch.tensor([eos])], [torch.tensor([eos, eos + 1])]), tokenizer=tokenizer, eos_token=eos)
    assert heard.pop() == (["!"], ['!"'])


@pytest.mark.parametrize(
    "answers",
    [
        (2, True, -1.5),
        torch.tensor([2.0, 1.0, -1.5], dtype=torch.float64),
        [torch.tensor(2), torch.tensor(1.0), torch.tensor(-1.5)],
        np.array([2, 1, -1.5]),
        [np.float32(2), np.int64(1), np.float64(-1.5)],
    ],
    ids=lambda answers: type(answers).__name__,
)
def test_all_that_is_a_number_is_a_score(sequences, answers):
    scores, valid, *_ = score(lambda prompts, completions: answers, sequences)
    assert scores.tolist() == [2.0, 1.0, -1.5] and valid.all()


@pytest.mark.parametrize(
    "answers, message",
    [
        ([1.0, 2.0], "returned 2 scores for 3 completions"),
        ([1.0] * 4, "returned 4 scores for 3 completions"),
        ([], "returned 0 scores for 3 completions"),
        (["good", "bad", "bad"], r"returned \['good', 'bad', 'bad'\]; expected a number, or None, for each completion"),
        ([[1.0]] * 3, "expected a number, or None, for each"),
        ([1.0, 2.0, 10**400], "expected a number, or None, for each"),
        ([torch.zeros(2)] * 3, "expected a number, or None, for each"),
        (torch.zeros(3, 1), "expected a number, or None, for each"),
        (torch.tensor(1.0), "expected a number, or None, for each"),
        (1.0, "returned 1.0; expected a number, or None, for each"),
        (None, "returned None; expected a number, or None, for each"),
    ],
)
def test_answers_that_are_no_scores_are_refused(sequences, answers, message):
    with pytest.raises(ValueError, match=message):
        score(lambda prompts, completions: answers, sequences)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])  # the last is infinite in float32
def test_a_score_that_is_not_finite_names_the_prompt(sequences, tokenizer, bad):
    reward, number = lambda prompts, completions: [None, 1.0, bad], re.escape(str(bad))
    with pytest.raises(FloatingPointError, match=rf"is {number}, .* prompt \[2, 0, 8\] and the completion \[9, 9\]"):
        score(reward, sequences)
    with pytest.raises(FloatingPointError, match=rf"is {number}, .* prompt '#!\)' and the completion '\*\*'"):
        score(reward, sequences, tokenizer=tokenizer)


@torch.no_grad()
def test_a_reward_model_that_is_not_finite_names_the_prompt(wandering_palm, sequences):
    model = RewardModel(wandering_palm())
    model.palm.token_emb.weight[8] = math.nan  # which the last prompt alone holds
    with pytest.raises(FloatingPointError, match=r"reward is nan, .* prompt \[2, 0, 8\]"):
        score(model, sequences)


def test_a_function_that_raises_is_asked_once_and_names_the_prompt_that_it_was_at(sequences, tokenizer):
    calls = []

    def stumbles_over_one(prompts, completions):
        calls.append(prompts)
        for prompt in prompts:
            if prompt[0] in (5, tokenizer.decode([5])):
                raise KeyError("no entry")
        return [0.0] * len(prompts)

    with pytest.raises(
        RuntimeError, match=r"function raised KeyError\('no entry'\) for prompt 1, \[5\], and the completion \[4\]$"
    ) as e:
        score(stumbles_over_one, sequences)
    assert isinstance(e.value.__cause__, KeyError)
    with pytest.raises(RuntimeError, match=r"for prompt 1, '&', and the completion ''$"):
        score(stumbles_over_one, sequences, tokenizer=tokenizer, eos_token=EOS)
    assert len(calls) == 2

    def stumbles_deeper(prompts, completions):
        def length(text):
            if len(text) == 2:
                raise OSError("too much")
            return len(text)

        calls.append(completions)
        return [length(completion) for completion in completions]

    with pytest.raises(RuntimeError, match=r"the reward 'size' raised .* for prompt 2, \[2, 0, 8\], and .* \[9, 9\]$"):
        score({"size": stumbles_deeper}, sequences)

    def stumbles_over_all(prompts, completions):
        calls.append(prompts)
        raise OSError("too much")

    together = r"OSError\('too much'\) for 3 prompts together, from \[7, 1\] on$"
    with pytest.raises(RuntimeError, match=together):
        score(stumbles_over_all, sequences)
    assert len(calls) == 4


def test_an_interrupted_reward_is_no_error_of_the_reward(sequences):
    interrupts = [KeyboardInterrupt]

    def reward(prompts, completions):
        if interrupts:
            raise interrupts.pop()
        return [0.0] * len(prompts)

    with pytest.raises(KeyboardInterrupt):
        score(reward, sequences)


@pytest.mark.parametrize("bins", [0, 4])
def test_the_scores_of_a_reward_model_are_those_of_each_row_alone(wandering_palm, draw_rows, stir, bins):
    model = RewardModel(wandering_palm(dropout=0.5), num_binned_output=bins).train()
    stir([model.prompt_embed, model.response_embed])
    prompts, responses = draw_rows(*LENGTHS), draw_rows(2, 7, 1, 3, seed=1)
    alone = [
        float(model(torch.cat(pair)[None], prompt_lengths=torch.tensor([len(pair[0])])).detach())
        for pair in zip(prompts, responses, strict=True)
    ]
    for batch_size in (1, 3, 64):
        scores, valid, *_ = score(model, join(prompts, responses), batch_size=batch_size)
        assert valid.all() and not scores.requires_grad
        assert scores.tolist() == pytest.approx(alone, abs=1e-5)


# what functions ask for

COLUMNS = {"answer": ["ten", None, 3], "truncated": [False, False, True], "step": 7}


def test_a_function_gets_what_its_signature_asks_for(sequences):
    heard = {}

    def trl_s(completions, completion_ids, answer, **others):
        heard["trl's"] = [row.tolist() for row in completions], completion_ids, answer, others
        return [1.0, 2.0, 3.0]

    def positional(asked, said, truncated, *, step, threshold=0.5):
        heard["positional"] = [row.tolist() for row in asked], [row.tolist() for row in said], truncated, step
        return [threshold] * 3

    class Judge:
        def __call__(self, prompts, completions, prompt_ids):
            heard["object"] = prompt_ids
            return [0, 0, 0]

    asked, said = [[7, 1], [5], [2, 0, 8]], [[3, 0, EOS], [EOS], [9, 9]]
    assert score(trl_s, sequences, keywords=COLUMNS).scores.tolist() == [1.0, 2.0, 3.0]
    completions, ids, answer, others = heard["trl's"]
    assert (completions, ids, answer) == (said, said, ["ten", None, 3])
    assert others.keys() == {"prompts", "prompt_ids", "truncated", "step"} and others["step"] == 7
    assert score(positional, sequences, keywords=COLUMNS).scores.tolist() == [0.5] * 3
    assert heard["positional"] == (asked, said, [False, False, True], 7)
    score(Judge(), sequences, keywords=COLUMNS)
    assert heard["object"] == asked
    partly = functools.partial(positional, threshold=0.25)
    assert score(partly, sequences, keywords=COLUMNS).scores.tolist() == [0.25] * 3


def plain(prompts, completions):
    return [float(len(prompt) + 10 * len(completion)) for prompt, completion in zip(prompts, completions, strict=True)]


def wrapped(*args, **kwargs):
    return plain(*args, **kwargs)


class Module(torch.nn.Module):
    def forward(self, prompts, completions):
        return plain(prompts, completions)


def with_defaults(a, b, weight=2.0):
    return [weight / 2 * number for number in plain(a, b)]


@pytest.mark.parametrize("reward", [plain, wrapped, Module(), with_defaults, lambda a, b, /: plain(a, b)])
def test_a_function_of_prompts_and_completions_alone_is_called_with_these(sequences, reward):
    assert score(reward, sequences, keywords=COLUMNS).scores.tolist() == [32.0, 11.0, 23.0]


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda completions, label: 0, r"function asks for 'label'; expected names among \['answer', .*: give prompts"),
        (lambda p, c, *, log_metric: 0, "asks for 'log_metric'; expected names among"),
        (lambda texts: 0, r"takes \(texts\); expected prompts and completions first, or a parameter completions"),
        (lambda texts, *, answer: 0, r"takes \(texts, answer\); expected prompts and completions first"),
    ],
)
def test_what_a_function_asks_for_in_vain_is_refused_before_it_is_called(sequences, reward, message):
    with pytest.raises(ValueError, match=message):
        score(reward, sequences, keywords=COLUMNS)
    with pytest.raises(ValueError, match=message):
        check_rewards(reward, num_tokens=13, keywords=list(COLUMNS))


# several rewards


def test_a_function_that_does_not_tell_its_signature_gets_prompts_and_completions():
    """As `max`, which is written in C."""
    given = {"prompts": ["a"], "completions": ["b"], "answer": ["c"]}
    assert arguments_of("the reward function", max, given) == ((["a"], ["b"]), {})


def test_a_parameter_is_given_once_by_its_place_or_its_name():
    given = {"prompts": ["a"], "completions": ["b"], "goal": [1]}
    plain = (["a"], ["b"])

    def of(function):
        return arguments_of("the reward function", function, given)

    assert of(lambda prompts, replies, goal: 0) == (plain, {"goal": [1]})
    assert of(lambda asked, replies, prompts=(), goal=(), /: 0) == (plain, {})  # no names to give them by
    assert of(lambda prompts, replies, **more: 0) == (plain, {"goal": [1]})
    assert of(lambda completions, prompts: 0) == ((), {"prompts": ["a"], "completions": ["b"]})


def test_named_rewards_are_weighed_and_each_keeps_its_own_scores(wandering_palm, sequences):
    model = RewardModel(wandering_palm())
    alone = score(model, sequences).scores
    rewards = {"model": model, "length": plain, "picky": lambda prompts, completions: [None, 4.0, None]}
    found = score(rewards, sequences, weights={"length": 0.5, "picky": -2.0})
    expected = alone.double() + torch.tensor([16.0, 5.5 - 8.0, 11.5])
    torch.testing.assert_close(found.scores, expected.float())
    assert found.valid.all() and list(found.by_name) == ["model", "length", "picky"]
    assert torch.equal(found.by_name["model"].scores, alone)
    assert found.by_name["length"].scores.tolist() == [32.0, 11.0, 23.0]
    assert found.by_name["picky"].numbers() == [None, 4.0, None]


def test_a_sum_is_over_the_rewards_that_could_say():
    """As by TRL's nansum; but where no reward that counts could say, one of weight 0 makes no score."""
    answers = {"a": [1.0, None, None, None], "b": [2.0, 3.0, None, 0.0], "seen": [9.0, 9.0, 9.0, None]}
    assert weighted_sum(answers, {"b": 10.0, "seen": 0.0}) == [21.0, 30.0, None, 0.0]
    assert weighted_sum(answers, {}) == [12.0, 12.0, 9.0, 0.0]


def test_a_sum_that_is_not_finite_is_refused_by_name(sequences):
    rewards = {"a": lambda prompts, completions: [1.0, 3e38, 1.0], "b": plain}
    with pytest.raises(FloatingPointError, match=r"the weighted sum of the rewards is 6e\+38, .* prompt \[5\]"):
        score(rewards, sequences, weights={"a": 2.0})
    with pytest.raises(FloatingPointError, match="the reward 'a' is nan"):
        score({"a": lambda prompts, completions: [math.nan] * 3}, sequences)


def test_functions_are_asked_at_the_same_time_and_awaited(sequences):
    """Each waits for the other: one after the other they would never end."""
    here, there = threading.Event(), threading.Event()

    def first(prompts, completions):
        here.set()
        assert there.wait(900)
        return [1.0] * 3

    async def second(completions, step):
        there.set()
        while not here.is_set():
            await asyncio.sleep(0)
        return [float(step)] * 3

    found = score({"first": first, "second": second}, sequences, keywords=COLUMNS, timeout=60.0)
    assert found.scores.tolist() == [8.0] * 3
    assert score(second, sequences, keywords=COLUMNS).scores.tolist() == [7.0] * 3


def test_coroutines_share_a_loop_for_good(sequences):
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * 3

    score(reward, sequences)
    score({"a": reward, "b": reward}, sequences)
    assert len(loops) == 3 and len(set(loops)) == 1 and not loops[0].is_closed()


def test_a_function_that_takes_too_long_is_named(sequences):
    end = threading.Event()

    def slow(prompts, completions):
        assert end.wait(30)
        return [0.0] * 3

    expected = r"the reward 'slow' did not answer within reward_timeout=0.05 seconds for 3 completions; .*: raise"
    with pytest.raises(TimeoutError, match=expected):
        score({"quick": plain, "slow": slow}, sequences, timeout=0.05)
    with pytest.raises(TimeoutError, match="the reward function did not answer"):
        score(slow, sequences, timeout=0.05)
    end.set()


def test_one_that_raises_is_heard_while_another_still_works(sequences):
    end = threading.Event()

    def slow(prompts, completions):
        assert end.wait(30)
        return [0.0] * 3

    def raises(prompts, completions):
        raise KeyError("no entry")

    with pytest.raises(RuntimeError, match=r"the reward 'raises' raised KeyError\('no entry'\) for 3 prompts"):
        score({"slow": slow, "raises": raises}, sequences)
    end.set()


def test_functions_in_threads_compute_as_the_caller_does(sequences):
    """Without gradients, and in its precision."""
    weight = torch.ones(4, 4, requires_grad=True)

    def reward(prompts, completions):
        found = weight @ weight
        return [float(found.requires_grad), float(found.dtype == torch.bfloat16), 0.0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = score(reward, sequences).scores.tolist()
        assert score({"a": reward, "b": reward}, sequences).by_name["b"].scores.tolist() == alone == [0.0, 1.0, 0.0]
    assert score({"a": reward, "b": reward}, sequences).by_name["b"].scores.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "reward, options, message",
    [
        ({}, {}, "got no reward; expected at least one"),
        (plain, {"weights": {"a": 1.0}}, "for one reward without a name; expected rewards by name"),
        (
            {"a": plain},
            {"weights": {"b": 1.0}},
            r"reward_weights has \['b'\]; expected names of rewards, which are \['a'\]",
        ),
        ({"a": plain}, {"weights": {"a": 0.0}}, "all of them 0; expected at least one other weight"),
        (
            plain,
            {"keywords": ["answer", "completion_ids"]},
            r"columns \['completion_ids'\], names under which .*: rename them",
        ),
        (plain, {"keywords": ["step", "step"]}, r"columns \['step'\], names under which functions get other values"),
    ],
)
def test_rewards_that_could_not_be_asked_or_weighed_are_refused(reward, options, message):
    with pytest.raises(ValueError, match=message):
        check_rewards(reward, num_tokens=13, **options)


def test_a_named_reward_model_of_another_vocabulary_is_refused(wandering_palm):
    with pytest.raises(ValueError, match="the reward model 'gold' has num_tokens=13; expected 12"):
        check_rewards({"gold": RewardModel(wandering_palm())}, num_tokens=12)
