"""The commands of ``palm-rlhf evaluate`` that open models: how well they predict, reward, and learn from rewards."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from beartype import beartype
from tyro.conf import Positional, arg

from palm_rlhf.data.templates import PRESETS
from palm_rlhf.evaluation.commands.evaluate_arguments import (
    File,
    Integer,
    Model,
    NamedFile,
    OptionalModel,
    Page,
    Preset,
    finish,
)
from palm_rlhf.evaluation.measures.model_folders import (
    default_device,
    is_reward_model,
    name_of,
    open_chat_model,
    open_palm,
)
from palm_rlhf.evaluation.measures.reward_bench import read_trios, score_trios
from palm_rlhf.evaluation.measures.rlhf_runs import read_run, read_settings, reference_scores, wins_by_step
from palm_rlhf.evaluation.measures.text_prediction import ALL, measure_text, read_documents
from palm_rlhf.evaluation.reports import tables
from palm_rlhf.evaluation.reports.report import Report
from palm_rlhf.model.weights_folder import local_folder
from palm_rlhf.policy.reward_model import RewardModel


@beartype
def lm(
    checkpoint: Model,
    *,
    data: NamedFile,
    text_key: str = "text",
    language_key: str = "lang",
    seq_len: int = 1024,
    context: Integer = None,
    batch_size: int = 4,
    report: Page = None,
) -> None:
    """How well a model predicts text: bits per byte, comparable over tokenizers, and perplexity per token.

    The last line is JSON: bits_per_byte, perplexity, tokens_per_byte, tokens, bytes, documents, and by_language where
    the file names several.

    Args:
        checkpoint: The folder of a run or of a model with its tokenizer, or a hub id; bytes where it has no tokenizer.
        data: A text, or records of JSON with one each.
        text_key: The key of a record's text.
        language_key: The key of its language.
        seq_len: Tokens that the model reads at once.
        context: Tokens before each that it has at least; half of seq_len by default.
        batch_size: Windows at once.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    palm, tokenizer = open_palm(checkpoint)
    documents = read_documents(data, text_key=text_key, language_key=language_key)
    parts = measure_text(palm, tokenizer, documents, seq_len=seq_len, context=context, batch_size=batch_size)
    numbers = parts[ALL].numbers()
    if len(parts) > 1:
        numbers["by_language"] = {name: part.numbers() for name, part in parts.items() if name != ALL}
    rows = {name: part.numbers() for name, part in parts.items()}
    sections = tables.by_group("Text", "language", rows, plotted="bits_per_byte", y_label="bits per byte")
    finish(Report(f"Language model {name_of(checkpoint)}", sections, numbers), report, numbers)


@beartype
def reward(
    checkpoint: Model,
    file: File,
    *,
    template: Preset = None,
    batch_size: int = 16,
    report: Page = None,
) -> None:
    """How often a reward model prefers the chosen reply, on a file of RewardBench's shape.

    The last line is JSON: score (the mean over the sections), accuracy with its interval, sections, and subsets with
    their numbers of pairs.

    Args:
        checkpoint: The folder of a run or of a reward model with its tokenizer and chat template, or a hub id.
        file: Records of prompt, chosen, rejected and subset.
        template: The chat template, where the folder has none.
        batch_size: Pairs at once.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    if not is_reward_model(local_folder(checkpoint)):
        raise ValueError(f"{checkpoint} holds no reward model, expected a folder of RewardModel.save_pretrained")
    model, tokenizer, chosen = open_chat_model(checkpoint, template)
    assert isinstance(model, RewardModel)
    left_out: Counter[str] = Counter()
    result = score_trios(model, tokenizer, chosen, read_trios(file, left_out), batch_size=batch_size)
    numbers = {**result.numbers(), "rejected": dict(left_out)}
    finish(Report(f"Reward model {name_of(checkpoint)}", tables.reward_bench(result), numbers), report, numbers)


@beartype
def run(
    folder: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    reference: OptionalModel = None,
    reward_model: OptionalModel = None,
    max_new_tokens: Integer = None,
    temperature: Annotated[float | None, arg(metavar="NUMBER")] = None,
    eos_token: Integer = None,
    template: Preset = None,
    seed: int = 0,
    report: Page = None,
) -> None:
    """A run of RLHF over its steps: KL to the reference, score, and the win rate against the reference.

    The last line is JSON: steps, kl, score and response_length of the last step, and win_rates by step where a
    reference and a reward model are given.

    Args:
        folder: The output_dir of an RLHFTrainer, with metrics.jsonl and samples.jsonl.
        reference: The model that it started from: it answers the prompts of samples.jsonl as well. Its folder, that of
            a run, or a hub id.
        reward_model: Says whose response is better; of the same kinds.
        max_new_tokens: Of the reference's responses; by default the run's, 256 where it has no checkpoint.
        temperature: At which it samples; by default the run's, 1 where it has no checkpoint.
        eos_token: The id that ends a response; by default the run's.
        template: The chat template of a run whose samples are texts alone: each prompt is then one message of a user.
        seed: Of the reference's responses.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    if (reference is None) != (reward_model is None):
        raise ValueError("got one of --reference and --reward-model, expected both: one answers, the other judges")
    lines, samples = read_run(folder)
    wins = []
    if reference is not None and reward_model is not None:
        if not samples:
            raise ValueError(f"{folder} has no samples.jsonl, expected one: train with sample_every and samples_kept")
        palm, tokenizer = open_palm(reference)
        given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "eos_token": eos_token}
        settings = {
            **{name: value for name, value in read_settings(folder).items() if name in given},
            **{name: value for name, value in given.items() if value is not None},
        }
        options = {name: value for name, value in settings.items() if value is not None}
        options |= {"seed": seed, "template": None if template is None else PRESETS[template]}
        # It reads the run's tokens: it needs neither a tokenizer of its own nor room for those of a chat template.
        judge_model = RewardModel.from_pretrained(local_folder(reward_model), device=default_device()).eval()
        wins = wins_by_step(samples, *reference_scores(samples, palm, judge_model, tokenizer, **options))
    last = lines[-1]
    numbers: dict[str, Any] = {"steps": last["step"]}
    numbers |= {name: last.get(name) for name in ("kl", "score", "response_length")}
    numbers["win_rates"] = [result.numbers() for result in wins]
    finish(Report(f"Run {folder.name}", tables.training_run(lines, wins), numbers), report, numbers)
