"""EleutherAI's evaluation harness, run against the server and on the exported folder: both give the same numbers."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from palm_rlhf.data.tokenizer import HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.served_model import load
from tests.conftest import NEEDS_CLIENTS

CONTEXT = 64
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Norway": "Oslo",
    "Greece": "Athens",
}
FACTS = [f"The capital of {country} is {city}, and people there are proud of it." for country, city in CAPITALS.items()]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
target_delimiter: ""
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "tiny_generation": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs:
  until: ["!", "?", ";", ":", "\\n", ","]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
""",
}


def documents(name):
    """What each task asks; every third choice is labelled wrongly, so that no model answers all of them."""
    cities = list(CAPITALS.values())
    for index, (country, city) in enumerate(CAPITALS.items()):
        question, choices = f"The capital of {country} is", [f" {cities[(index + step) % 8]}" for step in (3, 0, 1)]
        if name == "tiny_choice":
            yield {"question": question, "choices": choices, "answer": 1 if index % 3 else 2}
        elif name == "tiny_generation":
            yield {"question": question, "target": f" {city}"}
        elif index % 2:
            yield {"text": " ".join(FACTS[index - 1 : index + 1] + ["And so they were, at all times."] * 5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has learnt the facts in part, exported for transformers with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = HuggingFaceTokenizer.train(FACTS, 400)
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=48, depth=2, heads=2, dim_head=24, max_seq_len=CONTEXT)
    rows = [torch.tensor([tokenizer.eos_token, *tokenizer.encode(fact), tokenizer.eos_token]) for fact in FACTS]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token)
    optimizer = torch.optim.AdamW(palm.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        palm(tokens, return_loss=True).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("harness") / "atlas"
    palm.save_pretrained(path, format="cohere")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run_harness(tmp_path_factory):
    """Runs the tasks as `lm-eval run` does, without a network, and returns the results and the samples of each."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip(f"{NEEDS_CLIENTS}: pip install -e '.[clients]'")
    home = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        lines = [json.dumps(document) for document in documents(name)]
        (home / f"{name}.jsonl").write_text("\n".join(lines))
        data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {home / name}.jsonl\ntest_split: test\n"
        (home / f"{name}.yaml").write_text(f"task: {name}\n{data}{text}")
    offline = dict.fromkeys(
        ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"
    )
    environment = {**os.environ, **offline, "HF_HOME": str(home / "cache"), "OPENAI_API_KEY": "none"}

    def run(name, kind, **arguments):
        output = home / name
        command = ["run", "--tasks", *TASKS, "--include_path", home, "--output_path", output, "--log_samples"]
        command += ["--device", "cpu", "--batch_size", 3, "--model", kind]
        command += ["--model_args", *(f"{key}={value}" for key, value in arguments.items())]
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", *map(str, command)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (results,) = output.rglob("results_*.json")
        samples = {}
        for task in TASKS:
            (file,) = output.rglob(f"samples_{task}_*.jsonl")
            found = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda one: one["doc_id"])
            samples[task] = [one["resps"] for one in found]
        return json.loads(results.read_text())["results"], samples

    return run


def numbers(value):
    """All numbers in nested lists, which the harness writes as strings."""
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [float({"True": 1, "False": 0}.get(value, value))]


@pytest.fixture(scope="module")
def of_transformers(folder, run_harness):
    """What the harness finds of the folder by itself.

    In a rolling task it tells an API one token more of the text than the model has room for, and one is to be sampled.
    """
    return run_harness("transformers", "hf", pretrained=folder, dtype="float32", max_length=CONTEXT - 2)


@pytest.mark.slow(20)
@pytest.mark.parametrize("concurrent", [1, 4])
def test_the_harness_gets_the_numbers_of_transformers(folder, run_harness, of_transformers, start_server, concurrent):
    url, _ = start_server(load(folder, device="cpu", template="plain"), max_batch=4)
    results, samples = run_harness(
        f"server-{concurrent}",
        "local-completions",
        model="atlas",
        base_url=f"{url}/v1/completions",
        tokenizer=folder,
        num_concurrent=concurrent,
        max_length=CONTEXT,
        max_retries=1,
    )
    expected_results, expected_samples = of_transformers
    for task in ("tiny_choice", "tiny_rolling"):
        assert numbers(samples[task]) == pytest.approx(numbers(expected_samples[task]), abs=1e-3)
    assert samples["tiny_generation"] == expected_samples["tiny_generation"]
    metrics = {
        "tiny_choice": ("acc", "acc_norm"),
        "tiny_rolling": ("word_perplexity", "bits_per_byte"),
        "tiny_generation": ("exact_match",),
    }
    for task, names in metrics.items():
        for name in names:
            assert results[task][f"{name},none"] == pytest.approx(expected_results[task][f"{name},none"], rel=1e-4)
    assert 0.3 < results["tiny_choice"]["acc,none"] < 1
    assert results["tiny_generation"]["exact_match,none"] > 0.5
