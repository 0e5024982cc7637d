"""Conversations with an environment: who said which token, what each turn reads, where they end, what is refused."""

import re

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors

from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from palm_rlhf.policy import shared_prompts
from palm_rlhf.policy.best_of_n import best_of_n
from palm_rlhf.policy.rollout import ResponseSampling, collect
from palm_rlhf.policy.sequences import join, response_logprobs, spoken
from palm_rlhf.policy.turns import Turns, asked_columns

EOS = 4
LENGTHS = (3, 1, 6, 2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def done(messages):
    return None


def echo(messages) -> torch.Tensor:
    """The policy's own last words, backwards, each token one higher."""
    return (messages[-1]["content"].flip(0) + 1) % 13


def as_lists(messages: list[dict]) -> list[tuple]:
    return [(message["role"], message["content"].tolist()) for message in messages]


class Script:
    """A policy that says what it is told, at log-probabilities of -1, -2 and so on; it notes contexts and limits."""

    def __init__(self, *rounds: list[list[int]]):
        self.rounds, self.contexts, self.limits = list(rounds), [], []

    def __call__(self, contexts, num_samples, limits):
        self.contexts.append([context.tolist() for context in contexts])
        self.limits.append(limits.tolist())
        said = [torch.tensor(turn) for turn in self.rounds.pop(0)]
        assert len(said) == len(contexts) * num_samples
        return said, [-torch.arange(1.0, len(turn) + 1) for turn in said]


def converse(palm, script, environment, *, prompts=([7, 8],), room=20, num_samples=1, eos_token=EOS, **options):
    turns = Turns(environment, **{"max_turns": 5, **options})
    rows = [torch.tensor(prompt) for prompt in prompts]
    rooms = torch.full((len(rows),), room)
    return turns.converse(palm, script, rows, rooms, num_samples=num_samples, eos_token=eos_token)


@pytest.fixture(scope="module")
def palm(wandering_palm):
    return wandering_palm()


# what is said


def test_turns_and_replies_follow_each_other_by_hand(palm):
    """Two samples of a prompt; the second conversation is over first, and is asked nothing more."""
    script = Script([[1, 2, EOS], [3, EOS]], [[5, EOS]], [[EOS]])
    replies = {(1, 2): torch.tensor([9, 10, 11]), (5,): torch.tensor([], dtype=torch.long)}
    heard = []

    def environment(messages):
        heard.append(as_lists(messages))
        return replies.get(tuple(messages[-1]["content"].tolist()))

    first, second = converse(palm, script, environment, num_samples=2)
    assert script.contexts == [[[7, 8]], [[7, 8, 1, 2, EOS, 9, 10, 11]], [[7, 8, 1, 2, EOS, 9, 10, 11, 5, EOS]]]
    assert script.limits == [[20], [14], [12]]
    talk = [("user", [7, 8]), ("assistant", [1, 2]), ("user", [9, 10, 11]), ("assistant", [5]), ("user", []),
            ("assistant", [])]  # fmt: skip
    assert heard == [talk[:2], [("user", [7, 8]), ("assistant", [3])], talk[:4], talk]
    assert as_lists(first.messages) == talk and as_lists(second.messages) == heard[1]
    assert torch.cat(first.parts).tolist() == [1, 2, EOS, 9, 10, 11, 5, EOS, EOS]
    assert torch.cat(first.policy_mask).tolist() == [True] * 3 + [False] * 3 + [True] * 3
    assert torch.cat(first.logprobs).tolist() == [-1, -2, -3, 0, 0, 0, -1, -2, -1]
    assert torch.cat(second.policy_mask).tolist() == [True, True] and torch.cat(second.logprobs).tolist() == [-1, -2]
    assert not first.truncated and not second.truncated


@pytest.mark.parametrize(
    "said, room, options, response, asked",
    [
        ([[1, EOS]], 9, {"max_turns": 1}, [1, EOS], 1),  # it would go on, and may not
        ([[1, 2, 3]], 3, {}, [1, 2, 3], 0),  # no room for the EOS
        ([[1, 2]], 9, {"max_turn_tokens": 2}, [1, 2], 0),  # no room for it in a turn
        ([[1, EOS]], 4, {}, [1, EOS], 1),  # the reply would fill the room
        ([[1, EOS], [2, EOS]], 7, {}, [1, EOS, 9, 9, 2, EOS], 2),
        ([[1, EOS], [2, 3, 5]], 7, {}, [1, EOS, 9, 9, 2, 3, 5], 1),
        ([[1, EOS], [2, EOS]], 99, {"max_turns": 2}, [1, EOS, 9, 9, 2, EOS], 2),
    ],
    ids=str,
)
def test_a_conversation_that_is_cut_off_is_truncated_and_ends_with_an_action(
    palm, said, room, options, response, asked
):
    calls = []

    def environment(messages):
        calls.append(messages)
        return torch.tensor([9, 9])

    (talk,) = converse(palm, Script(*([turn] for turn in said)), environment, room=room, **options)
    assert talk.truncated and len(calls) == asked
    assert torch.cat(talk.parts).tolist() == response and torch.cat(talk.policy_mask)[-1]
    assert talk.messages[-1]["role"] == "assistant"


def test_without_an_eos_turns_have_one_length(palm):
    script = Script([[1, EOS]], [[2, 3]])

    def environment(messages):
        return torch.tensor([9]) if len(messages) == 2 else None

    (talk,) = converse(palm, script, environment, eos_token=None, max_turn_tokens=2)
    assert script.limits == [[2], [2]] and torch.cat(talk.parts).tolist() == [1, EOS, 9, 2, 3]
    assert as_lists(talk.messages)[1] == ("assistant", [1, EOS]) and not talk.truncated


# as it is sampled


@pytest.mark.parametrize("limit", [{"max_new_tokens": 17}, {"max_seq_len": 19}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_turn_reads_all_that_came_before(palm, draw_rows, said_by_hand, limit, batch_size):
    """The recorded log-probabilities are those of one forward over everything, and of each token by hand."""
    sampling = ResponseSampling(temperature=0.8, top_k=9, eos_token=EOS, **limit)
    turns = Turns(echo, max_turns=4, max_turn_tokens=5)
    rollout = collect(
        palm, draw_rows(*LENGTHS), sampling, num_samples=3, batch_size=batch_size, generator=seeded(), turns=turns
    )
    sequences = rollout.sequences
    mask = sequences.action_mask
    assert (~mask & (torch.arange(mask.shape[1]) < sequences.response_lengths.unsqueeze(-1))).any()
    with torch.no_grad():
        again = response_logprobs(palm, sequences, **sampling.truncation).logprobs
    torch.testing.assert_close(again[mask], rollout.logprobs[mask], rtol=0, atol=1e-5)
    assert not rollout.logprobs[~mask].any()
    room = [17 if "max_new_tokens" in limit else 19 - length for length in sequences.prompt_lengths.tolist()]
    assert (sequences.response_lengths <= torch.tensor(room)).all()
    for row, (prompt, response) in enumerate(zip(*spoken(sequences), strict=True)):
        assert torch.equal(prompt, draw_rows(*LENGTHS)[row // 3])
        by_hand, _ = said_by_hand(palm, prompt, response, **sampling.truncation)
        own = mask[row, : len(response)].tolist()
        expected = [logprob if is_action else 0.0 for logprob, is_action in zip(by_hand, own, strict=True)]
        assert rollout.logprobs[row, : len(response)].tolist() == pytest.approx(expected, abs=1e-5)
        # the same conversation in its messages
        parts, ends = [], []
        for message in rollout.messages[row][1:]:
            parts += message["content"].tolist()
            ends += [message["role"] == "assistant"] * len(message["content"])
            if message["role"] == "assistant" and len(parts) < len(response) and response[len(parts)] == EOS:
                parts, ends = [*parts, EOS], [*ends, True]
        assert parts == response.tolist() and ends == own


def test_changing_what_the_environment_said_changes_what_comes_after_it_alone(palm, draw_rows):
    sampling = ResponseSampling(max_new_tokens=24, eos_token=EOS)
    rollout = collect(
        palm, draw_rows(*LENGTHS), sampling, num_samples=4, generator=seeded(), turns=Turns(echo, 3, max_turn_tokens=8)
    )
    sequences = rollout.sequences
    in_response = torch.arange(sequences.action_mask.shape[1]) < sequences.response_lengths.unsqueeze(-1)
    replied = in_response & ~sequences.action_mask
    prompts, responses = spoken(sequences)
    changed = [
        torch.where(replied[row, : len(response)], (response + 1) % 13, response)
        for row, response in enumerate(responses)
    ]
    masks = [sequences.action_mask[row, : len(response)] for row, response in enumerate(responses)]
    with torch.no_grad():
        before, after = (response_logprobs(palm, join(prompts, rows, masks)).logprobs for rows in (responses, changed))
    later = sequences.action_mask & (replied.cumsum(dim=-1) > 0)
    earlier = sequences.action_mask & ~later
    assert later.sum() > 10
    assert torch.equal(before[earlier], after[earlier])
    assert ((before - after)[later].abs() > 1e-4).float().mean() > 0.9


def test_replies_are_read_after_a_prompt_that_several_conversations_share(palm, draw_rows, monkeypatch):
    sampling, turns = ResponseSampling(max_new_tokens=16, eos_token=EOS), Turns(echo, 3, max_turn_tokens=5)
    sequences = collect(palm, draw_rows(30, 25), sampling, num_samples=6, generator=seeded(), turns=turns).sequences
    assert not shared_prompts.pays(sequences, groups := shared_prompts.find_groups(sequences))
    with torch.no_grad():
        alone = response_logprobs(palm, sequences).logprobs
        monkeypatch.setattr(shared_prompts, "MIN_SAVED", 1)
        together = response_logprobs(palm, sequences).logprobs
    assert shared_prompts.pays(sequences, groups) and sequences.num_actions < int(sequences.response_lengths.sum())
    mask = sequences.action_mask
    torch.testing.assert_close(together[mask], alone[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("limit", [{"max_new_tokens": 9}, {"max_seq_len": 11}], ids=str)
@pytest.mark.parametrize("eos_token", [EOS, None])
def test_an_environment_that_is_done_at_once_changes_no_bit(palm, draw_rows, limit, eos_token):
    sampling = ResponseSampling(eos_token=eos_token, **limit)
    options = {"num_samples": 2, "batch_size": 4}
    plain = collect(palm, draw_rows(*LENGTHS), sampling, generator=seeded(), **options)
    talked = collect(palm, draw_rows(*LENGTHS), sampling, generator=seeded(), turns=Turns(done, 3), **options)
    for name in ("tokens", "prompt_lengths", "response_lengths", "action_mask", "actions"):
        assert torch.equal(getattr(plain.sequences, name), getattr(talked.sequences, name))
    assert torch.equal(plain.logprobs, talked.logprobs) and torch.equal(plain.truncated, talked.truncated)
    assert plain.messages is None and all(len(talk) == 2 for talk in talked.messages)


def test_the_best_of_n_conversations_comes_whole(palm):
    sampling, turns = ResponseSampling(max_new_tokens=20, eos_token=EOS), Turns(echo, 4, max_turn_tokens=6)
    prompt = torch.tensor([3, 1, 2])
    rollout = collect(palm, [prompt], sampling, num_samples=8, generator=seeded(), turns=turns)
    _, responses = spoken(rollout.sequences)
    longest = max(responses, key=len)
    assert len(rollout.messages[[len(row) for row in responses].index(len(longest))]) > 2

    def reward(prompts, completions):
        return [len(completion) for completion in completions]

    best = best_of_n(palm, reward, prompt, sampling, num_samples=8, generator=seeded(), turns=turns)
    assert torch.equal(best, longest)


# texts


def test_contents_and_replies_are_texts_where_there_is_a_tokenizer(wandering_palm):
    tokenizer = ByteTokenizer()
    end = tokenizer.eos_token
    heard = []

    def environment(messages):
        heard.append(messages)
        mark = torch.tensor([tokenizer.special_tokens["<|user|>"], *tokenizer.encode("is it?")])
        return {2: " é<|user|>", 4: mark}.get(len(messages))

    script = Script([[*b"yes", end]], [[*b"no", end]], [[end]])
    palm = wandering_palm(num_tokens=tokenizer.num_tokens)
    (talk,) = converse(palm, script, environment, prompts=[list(b"hm")], room=99, eos_token=end, tokenizer=tokenizer)
    texts = ["hm", "yes", " é<|user|>", "no", "is it?", ""]
    assert [message["content"] for message in heard[-1]] == texts
    (response,) = spoken(join([talk.prompt], [torch.cat(talk.parts)]), tokenizer, end)[1]
    assert response == "yes é<|user|>nois it?"  # the text of a reply forges no special token
    ids = torch.cat(talk.parts).tolist()
    assert ids.count(tokenizer.special_tokens["<|user|>"]) == 1 and ids.count(end) == 3


@pytest.fixture
def words():
    """A tokenizer of Hugging Face's that puts a BOS before every text."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


@pytest.mark.parametrize("wrap", [False, True], ids=["theirs", "ours"])
def test_no_bos_stands_before_a_reply(palm, words, wrap):
    tokenizer = HuggingFaceTokenizer(words, eos_token="</s>", pad_token=None, config={}) if wrap else words
    assert words.encode("b a").ids == [0, 3, 2]
    reply = ["b a", None]
    script = Script([[2, 1]], [[3, 1]])
    (talk,) = converse(palm, script, lambda messages: reply.pop(0), prompts=[[2]], eos_token=1, tokenizer=tokenizer)
    assert torch.cat(talk.parts).tolist() == [2, 1, 3, 2, 3, 1]


class Blanks(ByteTokenizer):
    """As SentencePiece does, it puts a blank before a text, but for one that goes on."""

    def encode(self, text):
        return super().encode(" " + text)

    def encode_continuation(self, text, *, after_special=False):
        return super().encode(text if after_special else "_" + text)


def test_a_reply_goes_on_after_the_eos(wandering_palm):
    tokenizer, replies = Blanks(), ["ok", None]
    script = Script([[97, tokenizer.eos_token]], [[98, tokenizer.eos_token]])
    palm = wandering_palm(num_tokens=tokenizer.num_tokens)
    (talk,) = converse(
        palm,
        script,
        lambda messages: replies.pop(0),
        prompts=[[99]],
        eos_token=tokenizer.eos_token,
        tokenizer=tokenizer,
    )
    assert torch.cat(talk.parts).tolist() == [97, tokenizer.eos_token, *b"ok", 98, tokenizer.eos_token]


# columns


def test_the_columns_that_an_environment_asks_for_go_with_the_conversation(palm):
    heard = []

    def environment(messages, goal, note="none", *, unknown=7):
        heard.append((messages[0]["content"].tolist(), goal, note, unknown))
        return torch.tensor([goal]) if len(messages) == 2 else None

    script = Script(*([[1, EOS]] * 4 for _ in range(2)))
    columns = {"goal": [5, 5, 6, 6], "note": list("aabb"), "other": [0] * 4}
    options = {"num_samples": 2, "eos_token": EOS, "columns": columns}
    turns, prompts = Turns(environment, max_turns=5), [torch.tensor([7]), torch.tensor([8])]
    talks = turns.converse(palm, script, prompts, torch.tensor([20, 20]), **options)
    expected = [([7], 5, "a", 7)] * 2 + [([8], 6, "b", 7)] * 2
    assert heard == expected * 2
    assert [torch.cat(talk.parts).tolist()[2] for talk in talks] == [5, 5, 6, 6]


def test_what_columns_a_signature_asks_for():
    names = {"goal": 0, "other": 0}
    assert asked_columns(done, names) == []
    assert asked_columns(lambda messages, **columns: None, names) == ["goal", "other"]
    assert asked_columns(lambda messages, other: None, names) == ["other"]
    assert asked_columns(type("Game", (), {"__call__": lambda self, messages, goal: None})(), names) == ["goal"]
    with pytest.raises(
        ValueError, match=r"asks for 'secret' beside the messages; expected columns .* \['goal', 'other'"
    ):
        asked_columns(lambda messages, secret, goal: None, names)


# what is refused


def test_an_environment_that_raises_names_the_conversation(palm):
    def stumbles(messages):
        if len(messages) > 2:
            raise KeyError("no entry")
        return torch.tensor([9])

    script = Script([[1, EOS], [2, EOS]], [[3, EOS], [5, EOS]])
    where = r"in the conversation on the prompt \[7, 8\], after turn 2, \[3\]"
    with pytest.raises(RuntimeError, match=r"the environment raised KeyError\('no entry'\) " + where) as error:
        converse(palm, script, stumbles, num_samples=2)
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "reply, message",
    [
        (7, r"returned 7 in the conversation .* after turn 1, \[1\]; expected 1-d ids, or None where it is over"),
        ("yes", "returned 'yes' in the conversation .*; expected 1-d ids, or None"),
        (torch.zeros(1, 2).long(), r"returned tensor\(\[\[0, 0\]\]\)"),
        (torch.tensor([13]), "token id 13 is outside the vocabulary"),
        (torch.tensor([0.5]), "token ids are torch.float32"),
    ],
    ids=str,
)
def test_what_is_no_reply_is_refused(palm, reply, message):
    with pytest.raises(ValueError, match=message):
        converse(palm, Script([[1, EOS]]), lambda messages: reply)


def test_with_a_tokenizer_a_text_is_expected(wandering_palm):
    palm, tokenizer = wandering_palm(num_tokens=ByteTokenizer().num_tokens), ByteTokenizer()
    with pytest.raises(ValueError, match=re.escape("on the prompt 'hm', after turn 1, 'a'; expected a text, 1-d ids")):
        converse(palm, Script([[97, tokenizer.eos_token]]), lambda messages: 7, prompts=[list(b"hm")],
                 eos_token=tokenizer.eos_token, tokenizer=tokenizer)  # fmt: skip


def test_messages_are_the_environments_own(palm):
    """What it does to the list that it gets reaches nobody."""

    def rude(messages):
        last = len(messages)
        messages[0]["content"] = torch.tensor([0])
        messages.clear()
        return torch.tensor([9]) if last == 2 else None

    (talk,) = converse(palm, Script([[1, EOS]], [[2, EOS]]), rude)
    assert as_lists(talk.messages) == [("user", [7, 8]), ("assistant", [1]), ("user", [9]), ("assistant", [2])]


@pytest.mark.parametrize("sampling", [ResponseSampling(), ResponseSampling(max_new_tokens=3, max_seq_len=9)], ids=str)
def test_the_room_has_to_be_clear(palm, sampling):
    with pytest.raises(ValueError, match="expected exactly one of them"):
        collect(palm, [torch.tensor([1])], sampling, turns=Turns(done, 3))
