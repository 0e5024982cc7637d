"""The commands of ``palm-rlhf evaluate`` that open models: lm, reward and run."""

from collections import Counter
from functools import partial
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
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.quantised.quantised_model import weights_bytes
from palm_rlhf.model.quantised.quantised_weights import Quantisation
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training.rlhf.sample_table import SAMPLES_FILE


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
    quantize: Quantisation | None = None,
    report: Page = None,
) -> None:
    """Measure how well a model predicts text: bits per byte, comparable over tokenizers, and perplexity per token.

    The last line is JSON: bits_per_byte, perplexity, tokens_per_byte, tokens, bytes, documents, and by_language if the
    file names several languages. With --quantize it has weights_bytes too, and under quantized all figures of the model
    in fewer bits, with perplexity_increase, a share of the plain weights' perplexity.

    Args:
        checkpoint: The folder of a run or of a model with its tokenizer, a .gguf file, a hub id, or smollm2; without a
            tokenizer the tokens are bytes.
        data: A text file, or JSON records with a text each.
        text_key: The key of a record's text.
        language_key: The key of a record's language.
        seq_len: Length of a window, in tokens.
        context: Least number of tokens before a predicted token; half of seq_len by default.
        batch_size: Windows in one forward.
        quantize: Measure the model with the matrices of its blocks in int8, a byte a weight, or int4, 4.5 bits a weight
            (NF4), too, beside the plain weights.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    palm, tokenizer = open_palm(checkpoint)
    documents = read_documents(data, text_key=text_key, language_key=language_key)
    measure = partial(measure_text, seq_len=seq_len, context=context, batch_size=batch_size)
    parts = measure(palm, tokenizer, documents)
    numbers = parts[ALL].numbers()
    if len(parts) > 1:
        numbers["by_language"] = {name: part.numbers() for name, part in parts.items() if name != ALL}
    rows = {name: part.numbers() for name, part in parts.items()}
    sections = tables.by_group("Text", "language", rows, plotted="bits_per_byte", y_label="bits per byte")
    if quantize is not None:
        numbers["weights_bytes"] = weights_bytes(palm)
        palm.quantize_(quantize)
        fewer_bits = {**measure(palm, tokenizer, documents)[ALL].numbers(), "weights_bytes": weights_bytes(palm)}
        fewer_bits["perplexity_increase"] = fewer_bits["perplexity"] / numbers["perplexity"] - 1
        columns = ("weights_bytes", "bits_per_byte", "perplexity")
        rows = {
            "plain": {name: numbers[name] for name in columns},
            quantize: {name: fewer_bits[name] for name in columns},
        }
        sections += tables.by_group("Weights", "weights", rows, plotted="bits_per_byte", y_label="bits per byte")
        numbers["quantized"] = {"kind": quantize, **fewer_bits}
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
    """Measure how often a reward model prefers the chosen reply, on a file in RewardBench's format.

    The last line is JSON: score (the mean over the sections), accuracy with its interval, sections, and subsets with
    their numbers of pairs.

    Args:
        checkpoint: The folder of a run or of a reward model with its tokenizer and chat template, or a hub id.
        file: Records of prompt, chosen, rejected and subset.
        template: The chat template, if the folder has none.
        batch_size: Pairs in one forward.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    if not is_reward_model(local_model(checkpoint)):
        raise ValueError(f"got {checkpoint}, expected the folder of a reward model, as `palm-rlhf reward` writes it")
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
    """Show an RLHF run over its steps: KL to the reference, score, and the win rate against the reference.

    The last line is JSON: steps, kl, score and response_length of the last step, and win_rates by step if a reference
    and a reward model are given.

    Args:
        folder: The output folder of `palm-rlhf rlhf` or of an RLHFTrainer, with metrics.jsonl and samples.jsonl.
        reference: The model that the run started from; it responds to the prompts of samples.jsonl too. Its folder or
            .gguf file, the folder of a run, a hub id, or smollm2.
        reward_model: The reward model that compares the responses: a folder or a hub id.
        max_new_tokens: Longest response of the reference, in tokens; by default the run's setting, or 256 without a
            checkpoint.
        temperature: Sampling temperature of the reference; by default the run's setting, or 1 without a checkpoint.
        eos_token: The token that ends a response; by default the run's setting.
        template: The chat template of a run with text samples only: each prompt is then one message of a user.
        seed: Of the reference's responses.
        report: Write a page with tables and pictures here, and JSON beside it.
    """
    if (reference is None) != (reward_model is None):
        raise ValueError("got one of --reference and --reward-model, expected both: one responds, the other scores")
    lines, samples = read_run(folder)
    wins = []
    if reference is not None and reward_model is not None:
        if not samples:
            raise ValueError(
                f"got no samples in {folder / SAMPLES_FILE}, expected some: train with a smaller sample_every"
            )
        palm, tokenizer = open_palm(reference)
        given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "eos_token": eos_token}
        settings = {
            **{name: value for name, value in read_settings(folder).items() if name in given},
            **{name: value for name, value in given.items() if value is not None},
        }
        options = {name: value for name, value in settings.items() if value is not None}
        options |= {"seed": seed, "template": None if template is None else PRESETS[template]}
        # The reward model reads the run's token ids, so it needs no tokenizer and no chat template.
        judge_model = RewardModel.from_pretrained(local_model(reward_model), device=default_device()).eval()
        wins = wins_by_step(samples, *reference_scores(samples, palm, judge_model, tokenizer, **options))
    last = lines[-1]
    numbers: dict[str, Any] = {"steps": last["step"]}
    numbers |= {name: last.get(name) for name in ("kl", "score", "response_length")}
    numbers["win_rates"] = [result.numbers() for result in wins]
    finish(Report(f"Run {folder.name}", tables.training_run(lines, wins), numbers), report, numbers)
