"""The README's reading lists: the files that explain the model, PPO and serving, in order, and short enough to be read.

A list is complete: each module of the package that its files import is in it, in the list of the model, or in BESIDE,
where a reader need not look to understand the topic.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

LIMITS = {"The model": (22, 2_900), "PPO": (25, 3_600), "Serving": (25, 4_000)}  # files, physical lines

# What a reader may leave closed: other ways to the same numbers, what an option switches on, and formats of files.
BESIDE = {
    "The model": {
        "ops.attention_choices": "which of several kinds of attention is fastest where",
        "ops.attention_chunked": "the same attention, in chunks",
        "ops.attention_flex": "the same attention, by a kernel that torch.compile writes",
        "ops.attention_fused": "the same attention, by PyTorch's kernels",
        "ops.triton": "the same functions, for GPUs",
        "ops.cpu": "the same functions in C, for CPUs",
        "ops.rotary_scaling": "wavelengths for long contexts",
        "ops.devices": "which of these runs where",
        "ops.nucleus": "where top-k and top-p cut a distribution off, without sorting it",
        "model.native_decode": "the same next token, by a kernel in C",
        "model.captured": "which models take the steps of fixed shapes",
        "model.static_generate": "the same tokens, by steps of fixed shapes, for GPUs",
        "model.shared_base": "several sets of adapters over one base",
        "model.pretrained": "opening folders of the hub",
        "model.adapter_folder": "files of adapters",
        "model.checkpoint": "files of weights",
        "model.weights_folder": "files of weights",
        "model.local_model": "where a model lies",
        "model.files": "files of text, and files that are whole or absent",
        "model.interop": "files of other packages",
        "model.quantised": "weights in fewer bits",
    },
    "PPO": {
        "ops": "functions of the model",
        "model": "loading and storing models",
        "policy.model_checks": "errors of arguments",
        "policy.shared_prompts": "the same embeddings, with each prompt read once",
        "policy.reward_model": "one kind of reward; another is any function of the responses",
        "policy.reward_model_folder": "files of weights",
        "policy.reward_functions": "how rewards that are functions are called",
        "policy.turns": "conversations with an environment",
        "policy.best_of_n": "an answer, not training",
        "algorithms.overoptimization": "evaluation",
        "algorithms.win_rate": "evaluation",
        "training.rlhf.config_checks": "errors of settings",
        "training.rlhf.dynamic_sampling": "GRPO",
        "training.rlhf.evaluation": "evaluation",
        "training.rlhf.reward_keywords": "what reward functions can ask for",
        "training.rlhf.running_moments": "the option scale_scores",
        "training.rlhf.sample_table": "tables of responses",
        "training.rlhf.token_table": "tables of tokens",
        "training.rlhf.variants": "GRPO's variants",
        "training.run.compilation": "the same numbers, by compiled code",
        "training.run.curves": "pictures",
        "training.run.launch": "several processes",
        "training.run.optimizer_state": "the optimiser in checkpoints",
        "training.run.random_state": "random generators in checkpoints",
        "training.run.readings": "numbers that stay on a GPU until they are looked at",
        "training.run.sharding": "several GPUs",
    },
    "Serving": {
        "ops": "functions of the model",
        "model": "loading and storing models",
        "policy": "the reward model",
        "data": "tokenizers and chat templates",
        "serving.served_adapters": "an option of the server",
        "serving.structured": "replies that follow a grammar",
        "serving.engine.capacity": "how many replies the memory holds",
        "serving.engine.launched_step": "steps of a GPU that begin before the last tokens are known",
        "serving.engine.prefix_cache": "how cached beginnings of prompts are found and forgotten",
        "serving.engine.row_adapters": "replies under several LoRA adapters in one batch",
        "serving.engine.row_options": "options of sampling as tensors of all rows",
        "serving.engine.static_step": "the same next token on a GPU, by CUDA graphs",
        "serving.engine.transfer": "copies to a GPU and back that do not wait",
        "serving.engine.prompt_logprobs": "an option of requests",
        "serving.protocol.echo": "an option of requests",
        "serving.protocol.responses_api": "another form of requests and replies",
        "serving.protocol.responses_parameters": "another form of requests and replies",
        "serving.protocol.token_display": "how log-probabilities show a token",
        "serving.protocol.tokenize_api": "another form of requests and replies",
        "serving.protocol.tool_calls": "tools",
        "serving.http.descriptions": "the description of the paths for other programs",
        "serving.http.access": "which web pages may drive a server",
        "serving.http.api_keys": "who may use a server",
        "serving.http.fastapi_import": "an error where an extra is missing",
        "serving.http.middleware": "who may use a server, and the log",
        "serving.http.page_files": "the files of the chat page",
        "serving.http.prometheus": "metrics",
        "serving.http.request_log": "the log",
    },
}


class ReadingList(NamedTuple):
    """One list of the README: its files, in order, and the numbers that the README gives."""

    files: list[Path]
    num_files: int
    num_lines: int


@pytest.fixture(scope="module")
def lists(root) -> dict[str, ReadingList]:
    """The lists by their topic."""
    text = (root / "README.md").read_text(encoding="utf-8")
    item = r"^- \*\*([^*\n]+)\*\*[^(\n]*\((\d+) files, ([\d,]+) lines\):\s(.+?)\n(?=\n|- )"
    found = re.findall(item, text, re.M | re.S)
    return {
        topic: ReadingList(
            [root / "palm_rlhf" / name for name in re.findall(r"`([\w/]+\.py)`", names)],
            int(num_files),
            int(num_lines.replace(",", "")),
        )
        for topic, num_files, num_lines, names in found
    }


def physical_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def module_of(path: Path) -> str:
    """The dotted name of a file below the package: `ops/masked.py` is `ops.masked`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[parts.index("palm_rlhf") + 1 :]).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, but for what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checkers = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    package = Path(*path.parts[: path.parts.index("palm_rlhf") + 1])
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and id(node) not in for_checkers
            and (node.module or "").startswith("palm_rlhf.")
        ):
            base = node.module.removeprefix("palm_rlhf.")
            for alias in node.names:
                below = f"{base}.{alias.name}"
                found.add(below if (package / f"{below.replace('.', '/')}.py").is_file() else base)
    return found


@pytest.mark.parametrize("topic", LIMITS)
def test_a_list_is_short_enough_and_its_numbers_are_true(lists, topic):
    listed = lists[topic]
    print(f"\n{topic}")
    for path in listed.files:
        print(f"{physical_lines(path):5d}  {module_of(path)}")
    num_lines = sum(map(physical_lines, listed.files))
    max_files, max_lines = LIMITS[topic]
    assert len(set(listed.files)) == len(listed.files) == listed.num_files <= max_files
    assert num_lines <= max_lines
    assert num_lines == pytest.approx(listed.num_lines, abs=50), f"the README says {listed.num_lines}"


@pytest.mark.parametrize("topic", LIMITS)
def test_a_list_is_complete(lists, topic):
    known = {module_of(path) for path in [*lists[topic].files, *lists["The model"].files]}
    missing = {
        f"{name} (by {module_of(path)})"
        for path in lists[topic].files
        for name in imported(path) - known
        if not any(name == beside or name.startswith(f"{beside}.") for beside in BESIDE[topic])
    }
    assert missing == set()


@pytest.mark.parametrize("topic", LIMITS)
def test_a_list_begins_with_what_the_rest_builds_on(lists, topic):
    """A file comes after those that it imports."""
    names = [module_of(path) for path in lists[topic].files]
    early = {
        (name, other)
        for place, (name, path) in enumerate(zip(names, lists[topic].files, strict=True))
        for other in imported(path) & set(names[place + 1 :])
    }
    assert early == set()


@pytest.mark.parametrize("topic", LIMITS)
def test_what_is_left_out_is_there_to_be_left_out(lists, topic, root):
    for name in BESIDE[topic]:
        path = root / "palm_rlhf" / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_a_hidden_import_is_noticed(tmp_path):
    path = tmp_path / "palm_rlhf/policy/new.py"
    path.parent.mkdir(parents=True)
    (tmp_path / "palm_rlhf/model").mkdir()
    (tmp_path / "palm_rlhf/model/palm.py").touch()
    path.write_text(
        "from typing import TYPE_CHECKING\nfrom palm_rlhf.model import palm\n\nif TYPE_CHECKING:\n"
        "    from palm_rlhf.ops.masked import masked_mean\n\n\n"
        "def f():\n    from palm_rlhf.training.run.log import Metrics\n"
    )
    assert imported(path) == {"model.palm", "training.run.log"}
