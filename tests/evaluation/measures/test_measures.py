"""Models measured: bits per byte, RewardBench, local judges, answers, and runs of reinforcement learning."""

import json
import math

import pytest
import torch

from palm_rlhf import PPOConfig, RewardModel, RLHFTrainer
from palm_rlhf.data.conversation import encode_prompt, encode_response
from palm_rlhf.data.files.records import write_records
from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from palm_rlhf.evaluation.judging.answers import Question
from palm_rlhf.evaluation.judging.journal import Journal
from palm_rlhf.evaluation.judging.judges import JudgeRequest
from palm_rlhf.evaluation.judging.judgments import collect_judgments, pairwise_requests, scores_of
from palm_rlhf.evaluation.judging.model_judges import LocalJudge, RewardJudge
from palm_rlhf.evaluation.measures.answer_statistics import (
    distinct_n,
    read_output_texts,
    statistics_by_language,
    text_statistics,
)
from palm_rlhf.evaluation.measures.reward_bench import SECTIONS, accuracies, read_trios, score_trios
from palm_rlhf.evaluation.measures.rlhf_runs import Sample, StepResult, read_run, reference_scores, wins_by_step
from palm_rlhf.evaluation.measures.text_prediction import Document, measure_text, read_documents
from palm_rlhf.policy.sequences import join
from tests.factories import palm_of

TEMPLATE = PRESETS["default"]
TEXT = "The quick brown fox jumps over the lazy dog. Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich."


def tiny_palm(num_tokens=261, seed=0):
    return palm_of(seed, num_tokens=num_tokens).eval()


def nats_by_hand(palm, ids):
    """The code length of a text that fits into the context, token by token."""
    logprobs = palm(torch.tensor([ids])).log_softmax(dim=-1)[0]
    said = sum(float(logprobs[place, token].detach()) for place, token in enumerate(ids[1:]))
    return math.log(palm.num_tokens) - said


def test_bits_per_byte_are_the_code_length_of_the_text_whatever_the_tokenizer():
    bpe = HuggingFaceTokenizer.train([TEXT] * 4, 300)
    for tokenizer in (ByteTokenizer(), bpe):
        palm = tiny_palm(tokenizer.num_tokens)
        ids = tokenizer.encode(TEXT)
        nats = nats_by_hand(palm, ids)
        found = measure_text(palm, tokenizer, [Document(TEXT)], seq_len=256)["all"]
        assert found.nats == pytest.approx(nats, rel=1e-5)
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(nats / len(ids)), rel=1e-5)
        # the mutants: by characters or by tokens, which differ from bytes here
        assert len(TEXT) != len(TEXT.encode()) and found.num_bytes == len(TEXT.encode())


def test_a_model_that_knows_nothing_spends_the_logarithm_of_its_vocabulary():
    palm = tiny_palm()
    with torch.no_grad():
        palm.token_emb.weight.zero_()
    found = measure_text(palm, ByteTokenizer(), [Document("abc"), Document("ü")], seq_len=8)["all"]
    assert found.perplexity == pytest.approx(261)
    assert found.bits_per_byte == pytest.approx(math.log2(261))
    assert (found.num_tokens, found.num_bytes, found.num_documents) == (5, 5, 2)


def test_windows_change_the_context_but_no_token_is_lost():
    palm, documents = tiny_palm(), [Document(TEXT, "de"), Document("x", "en"), Document(TEXT[:31])]
    parts = measure_text(palm, ByteTokenizer(), documents, seq_len=16, context=4, batch_size=3)
    assert set(parts) == {"all", "de", "en", "unknown"}
    assert parts["all"].num_tokens == sum(len(document.text.encode()) for document in documents)
    assert parts["all"].nats == pytest.approx(sum(parts[name].nats for name in ("de", "en", "unknown")))
    alone = measure_text(palm, ByteTokenizer(), documents[:1], seq_len=16, context=4)
    assert set(alone) == {"all"} and alone["all"].nats == pytest.approx(parts["de"].nats, rel=1e-5)
    with pytest.raises(ValueError, match="expected a context"):
        measure_text(palm, ByteTokenizer(), documents, seq_len=4, context=5)


def test_the_lm_command(tmp_path, write_lines, evaluate):
    palm = tiny_palm(256)
    palm.save_pretrained(tmp_path / "bytes")
    (tmp_path / "plain.txt").write_text(TEXT)
    result, _ = evaluate("lm", tmp_path / "bytes", "--data", tmp_path / "plain.txt", "--seq-len", 256)
    expected = nats_by_hand(palm, list(TEXT.encode()))
    assert result["bits_per_byte"] == pytest.approx(expected / math.log(2) / len(TEXT.encode()), rel=1e-5)
    records = write_lines(tmp_path / "texts.jsonl", [{"text": "hallo", "lang": "de"}, {"text": "hello", "lang": "en"}])
    result, printed = evaluate("lm", tmp_path / "bytes", "--data", records, "--report", tmp_path / "lm.html")
    assert set(result["by_language"]) == {"de", "en"} and result["documents"] == 2
    assert "<svg" in (tmp_path / "lm.html").read_text() and "perplexity" in printed
    with pytest.raises(ValueError, match="expected a text under 'content'"):
        evaluate("lm", tmp_path / "bytes", "--data", records, "--text-key", "content")
    tiny_palm(100).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="too few for bytes"):
        evaluate("lm", tmp_path / "small", "--data", records)
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        read_documents(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no text"):
        read_documents(tmp_path / "empty.txt")


@pytest.mark.parametrize("name", ["texts.csv", "texts.csv.gz", "texts.tsv", "texts.parquet", "texts.jsonl"])
def test_tables_hold_a_text_in_each_row(tmp_path, name):
    write_records(tmp_path / name, [{"lang": "en", "text": "Hello, you"}, {"lang": "de", "text": "3"}])
    assert read_documents(tmp_path / name) == [Document("Hello, you", "en"), Document("3", "de")]


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b"], 1) == 2 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert distinct_n(["a b", "A b"], 2) == 1 / 2  # over all texts, in any case
    assert distinct_n(["a"], 2) is None
    assert distinct_n(["No, no!"], 1) == 3 / 4
    with pytest.raises(ValueError, match="at least 1"):
        distinct_n(["a"], 0)


def test_statistics_of_texts():
    statistics = text_statistics(["a b", "abcd e f g", " "])
    assert (statistics.count, statistics.empty) == (3, 1)
    assert statistics.characters["mean"] == pytest.approx((3 + 10 + 1) / 3)
    assert (statistics.words["median"], statistics.words["max"]) == (2, 4)
    parts = statistics_by_language([Document("a", "en"), Document("bb", "de"), Document("cc")])
    assert list(parts) == ["all", "de", "en", "unknown"] and parts["all"].count == 3
    with pytest.raises(ValueError, match="no texts"):
        text_statistics([])


def test_the_outputs_command(tmp_path, write_lines, evaluate):
    outputs = write_lines(tmp_path / "o.jsonl", [{"instruction": "?", "output": "a b", "generator": "g"}])
    chats = write_lines(
        tmp_path / "c.jsonl",
        [
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ja ja"}], "lang": "de"},
            {"choices": [{"turns": ["x", "y z"]}], "lang": "en"},
        ],
    )
    result, _ = evaluate("outputs", outputs, chats)
    assert set(result) == {"o.jsonl", "c.jsonl", "c.jsonl, de", "c.jsonl, en"}
    assert (result["c.jsonl"]["count"], result["c.jsonl, de"]["distinct_1"]) == (3, 0.5)
    with pytest.raises(ValueError, match="expected an answer as"):
        read_output_texts(write_lines(tmp_path / "x.jsonl", [{"a": 1}]))


def test_accuracies_by_section_by_hand():
    pairs = (
        [("alpacaeval-easy", 1.0)] * 3
        + [("alpacaeval-hard", 0.0)]
        + [("math-prm", 1.0)] * 10
        + [("hep-go", 0.0)] * 2
        + [("hep-rust", 1.0)] * 2
        + [("of our own", 0.5)]
    )
    result = accuracies(*zip(*pairs))
    assert result.subsets["alpacaeval-easy"] == (1.0, 3) and result.subsets["of our own"] == (0.5, 1)
    assert result.sections == {"Chat": 0.75, "Reasoning": (1.0 + 0.5) / 2, "of our own": 0.5}
    assert result.sections["Reasoning"] != 12 / 14  # mathematics and code count the same, however many pairs they have
    assert result.score == pytest.approx((0.75 + 0.75 + 0.5) / 3)
    assert result.accuracy == pytest.approx(15.5 / 19)
    assert result.interval[0] < result.accuracy < result.interval[1]
    assert sum(len(subsets) for subsets in SECTIONS.values()) == 23


def reward_folder(path):
    tokenizer = ByteTokenizer()
    torch.manual_seed(1)
    model = RewardModel(tiny_palm()).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    TEMPLATE.save_pretrained(path)
    return model


def parts_of(prompt, response):
    messages = [{"role": "user", "content": prompt}]
    return (
        encode_prompt(messages, ByteTokenizer(), TEMPLATE),
        encode_response(messages, response, ByteTokenizer(), TEMPLATE),
    )


def score_by_hand(model, prompt, response):
    return float(model.score(join(*([part] for part in parts_of(prompt, response)))))


def test_a_reward_model_on_a_file_of_rewardbenchs_shape(tmp_path, write_lines, evaluate):
    model = reward_folder(tmp_path / "reward")
    texts = [f"reply number {place} {'!' * place}" for place in range(12)]
    records = [
        {"prompt": f"Prompt {place}", "chosen": texts[place], "rejected": texts[-1 - place], "subset": f"s{place % 2}"}
        for place in range(6)
    ]
    path = write_lines(
        tmp_path / "bench.jsonl", [*records, {"prompt": "p", "chosen": "x", "rejected": "x", "subset": "s"}]
    )
    right = [
        float(score_by_hand(model, r["prompt"], r["chosen"]) > score_by_hand(model, r["prompt"], r["rejected"]))
        for r in records
    ]
    result, _ = evaluate("reward", tmp_path / "reward", path, "--batch-size", 4)
    assert result["accuracy"] == sum(right) / 6
    assert result["subsets"] == {"s0": [sum(right[::2]) / 3, 3], "s1": [sum(right[1::2]) / 3, 3]}
    assert result["rejected"] == {"no two different replies": 1} and result["num_pairs"] == 6
    # Chosen and rejected exchanged, all that was right is wrong: a mutant that takes them by place would not see it.
    turned = [{**record, "chosen": record["rejected"], "rejected": record["chosen"]} for record in records]
    trios = read_trios(write_lines(tmp_path / "turned.jsonl", turned))
    assert score_trios(model, ByteTokenizer(), TEMPLATE, trios).accuracy == pytest.approx(1 - sum(right) / 6)
    for size in (0, -4):
        with pytest.raises(ValueError, match=f"got batch_size {size}"):
            score_trios(model, ByteTokenizer(), TEMPLATE, trios, batch_size=size)
    tiny_palm().save_pretrained(tmp_path / "palm")
    with pytest.raises(ValueError, match="expected the folder of a reward model"):
        evaluate("reward", tmp_path / "palm", path)
    with pytest.raises(ValueError, match="got no pair"):
        read_trios(write_lines(tmp_path / "none.jsonl", [{"prompt": "x"}]))


def test_a_reward_model_as_the_judge(tmp_path, bench, evaluate):
    model = reward_folder(tmp_path / "reward")
    questions, first, second = bench
    common = ["--questions", questions, "--answers", first, second, "--judge", tmp_path / "reward"]
    with pytest.raises(ValueError, match="a reward model has none"):
        evaluate("judge", *common, "--out", tmp_path / "1.jsonl", "--temperature", 1)
    with pytest.raises(ValueError, match="gives the same judgment each time"):
        evaluate("judge", *common, "--out", tmp_path / "1.jsonl", "--samples", 3)
    result, _ = evaluate("judge", *common, "--out", tmp_path / "1.jsonl")
    better = [
        score_by_hand(model, f"Question {place}?", f"alpha says 1-{place}")
        > score_by_hand(model, f"Question {place}?", f"beta says 1-{place}")
        for place in range(4)
    ]
    entries = [json.loads(line) for line in (tmp_path / "1.jsonl").read_text().splitlines()]
    assert len(entries) == 8 and not any(entry["swapped"] for entry in entries)  # it sees no order, and asks once
    assert [entry["scores"][0] > entry["scores"][1] for entry in entries[:4]] == better
    assert result["parsed"] == 8 and result["conflict_rate"] is None and result["judge"] == "reward"
    judge = RewardJudge(model, ByteTokenizer(), TEMPLATE)
    question = Question("1", ("a", "b"))
    assert judge.score(question, ("x", "y"), 2) != judge.score(question, ("z", "y"), 2)  # it reads what came before
    assert judge.score(question, ("x", "y"), 1) == judge.score(question, ("x", "z"), 1)  # and nothing that comes after


def test_a_model_of_ones_own_as_the_judge(tmp_path, bench, evaluate):
    tokenizer = ByteTokenizer()
    palm = tiny_palm()
    judge = LocalJudge(palm, tokenizer, TEMPLATE, temperature=1.0, max_tokens=6)
    request = JudgeRequest(Question("1", ("a?",)), 1, ("x", "y"), (("b",), ("c",)), "verdict")
    prompt = encode_prompt(request.messages, tokenizer, TEMPLATE)
    reply = judge(request)
    assert reply == judge(request)  # the same in every run
    other = judge(JudgeRequest(request.question, 1, request.models, request.replies, "verdict", sample=1))
    assert reply.text != other.text and reply.usage["prompt_tokens"] == len(prompt)

    palm.save_pretrained(tmp_path / "palm")
    tokenizer.save_pretrained(tmp_path / "palm")
    TEMPLATE.save_pretrained(tmp_path / "palm")
    questions, first, second = bench
    common = ["--questions", questions, "--answers", first, second, "--judge", tmp_path / "palm", "--max-tokens", 4]
    result, printed = evaluate("judge", *common, "--out", tmp_path / "1.jsonl")
    assert (result["unparsed"], result["parsed"], result["win_rate"]) == (16, 0, None)  # it babbles, and none is scored
    assert "Judgments not parsed" in printed and result["judge"] == "palm"


def test_a_local_judge_is_any_callable_with_an_identity(bench, tmp_path):
    from palm_rlhf.evaluation.judging.answers import Pair
    from palm_rlhf.evaluation.judging.judges import Judge, JudgeReply

    class Longest(Judge):
        name, identity = "longest", {"rule": "longest"}

        def __call__(self, request):
            return JudgeReply(scores=[float(len(reply[request.turn - 1])) for reply in request.replies])

    pair = Pair(Question("1", ("?",)), ("long answer",), ("short",))
    requests = pairwise_requests([pair], ("a", "b"), "scores")
    with Journal(tmp_path / "j.jsonl") as journal:
        entries = collect_judgments(requests, Longest(), journal)
    assert [scores_of(entry) for entry in entries] == [(11.0, 5.0)] * 2
    assert [entry["scores"] for entry in entries] == [[11.0, 5.0], [5.0, 11.0]]  # as they were shown


@pytest.fixture
def trained_run(tmp_path):
    """A real run of a few steps, whose reward likes the byte 120."""
    palm = tiny_palm()
    prompts = [torch.tensor([97 + place, 98]) for place in range(8)]
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=lambda prompts, completions: [float((row == 120).float().mean()) for row in completions],
        prompt_token_ids=prompts,
        config=PPOConfig(
            num_steps=4, rollouts_per_step=8, minibatch_size=8, epochs=1, max_new_tokens=5, eos_token=10,
            sample_every=2, samples_kept=4, learning_rate=1e-3, plot=False,
        ),
        output_dir=tmp_path / "run",
    )  # fmt: skip
    for _ in trainer.steps():
        pass
    return tmp_path / "run"


def test_a_run_over_its_steps(trained_run, tmp_path, evaluate):
    lines, samples = read_run(trained_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [sample.step for sample in samples] == [2] * 4 + [4] * 4
    assert all(isinstance(sample.completion, tuple) for sample in samples)
    result, _ = evaluate("run", trained_run)
    assert (result["steps"], result["win_rates"]) == (4, []) and result["kl"] == lines[-1]["kl"]

    tiny_palm().save_pretrained(tmp_path / "reference")
    reward_folder(tmp_path / "reward")
    options = ["--reference", tmp_path / "reference", "--reward-model", tmp_path / "reward", "--eos-token", 10]
    result, printed = evaluate("run", trained_run, *options, "--max-new-tokens", 5, "--report", tmp_path / "run.html")
    assert [row["step"] for row in result["win_rates"]] == [2, 4]
    assert all(row["wins"] + row["losses"] + row["ties"] == 4 for row in result["win_rates"])
    page = (tmp_path / "run.html").read_text()
    assert "KL to the reference" in page and "Win rate against the reference" in page and page.count("<svg") >= 4
    assert "Against the reference" in printed
    as_trained, _ = evaluate("run", trained_run, *options[:4])  # what is sampled as in training is not told again
    assert as_trained == result
    with pytest.raises(ValueError, match="expected both"):
        evaluate("run", trained_run, "--reference", tmp_path / "reference")
    with pytest.raises(FileNotFoundError, match="output folder"):
        read_run(tmp_path / "reference")
    (trained_run / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    with pytest.raises(ValueError, match="without kl and kl_coef"):
        read_run(trained_run)


def test_samples_as_texts_get_their_template_and_end_back(tmp_path):
    model, reference, tokenizer = reward_folder(tmp_path / "reward"), tiny_palm(), ByteTokenizer()
    samples = [Sample(1, "Prompt", "said"), Sample(1, "Other", "")]
    ours, theirs = reference_scores(samples, reference, model, tokenizer, template=TEMPLATE, max_new_tokens=4)
    assert ours[0] == pytest.approx(score_by_hand(model, "Prompt", "said"), abs=1e-6)
    assert len(theirs) == 2 and theirs != ours
    # the same by ids, as runs without a tokenizer have them
    ids = [
        Sample(1, tuple(prompt.tolist()), tuple(response.tolist()))
        for prompt, response in ((parts_of("Prompt", "said")), (parts_of("Other", "")))
    ]
    again = reference_scores(ids, reference, model, tokenizer, eos_token=tokenizer.eos_token, max_new_tokens=4)
    assert again == (pytest.approx(ours, abs=1e-6), pytest.approx(theirs, abs=1e-6))
    with pytest.raises(ValueError, match="set eos_token"):
        reference_scores(samples, reference, model, tokenizer)


def test_other_weights_under_the_same_name_judge_anew(tmp_path, bench, evaluate):
    reward_folder(tmp_path / "reward")
    questions, first, second = bench
    common = ["--questions", questions, "--answers", first, second, "--judge", tmp_path / "reward"]
    evaluate("judge", *common, "--out", tmp_path / "1.jsonl")
    evaluate("judge", *common, "--out", tmp_path / "1.jsonl")
    assert len((tmp_path / "1.jsonl").read_text().splitlines()) == 8
    RewardModel(tiny_palm(seed=5)).save_pretrained(tmp_path / "reward")
    evaluate("judge", *common, "--out", tmp_path / "1.jsonl")
    assert len((tmp_path / "1.jsonl").read_text().splitlines()) == 16


def test_wins_by_step_by_hand():
    samples = [Sample(step, "p", "c") for step in (1, 1, 1, 2)]
    found = wins_by_step(samples, [1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 9.0, 1.0])
    assert found == [StepResult(1, 1, 1, 1), StepResult(2, 0, 1, 0)]
    assert found[0].win_rate == 0.5 and found[1].win_rate == 0.0
    low, high = found[0].interval
    assert 0 < low < 0.5 < high < 1
