"""The command ``palm-rlhf sft``: a model fine-tuned on conversations."""

from pathlib import Path
from typing import Annotated

import torch
from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.commands.run_folder import finish, quoted, run_folder, save_model, say
from palm_rlhf.commands.start_models import ChatModel, ModelName, TemplateName, open_chat_model
from palm_rlhf.commands.training_data import examples_of, fitted, read, split
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.packing import PackedSampler
from palm_rlhf.training.supervised import SCOPE, SupervisedTrainer
from palm_rlhf.training.supervised_config import SupervisedConfig


@beartype
def sft(
    data: Annotated[Positional[Path], arg(metavar="CONVERSATIONS")],
    *,
    model: ModelName,
    output_dir: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    resume: bool = False,
    template: TemplateName = "auto",
    held_out: Annotated[float, arg(metavar="0..1")] = 0.05,
    seq_len: int = 1024,
    training: OmitArgPrefixes[SupervisedConfig] = SupervisedConfig(),  # noqa: B008 (it is frozen)
) -> None:
    """Fine-tune a model on conversations, with adapters if --lora-r asks for them, which are merged at the end.

    The last line on standard output is JSON: valid_loss in nats per token, steps, seconds, output_dir and model.

    Args:
        data: A file of any form that `palm-rlhf data convert` reads: Open-Assistant, ShareGPT, messages, preferences.
        model: The model to start from, with its tokenizer and template: its folder, that of a run, or a hub id.
        output_dir: Where model, tokenizer, template, checkpoints and metrics go; a new folder in runs/ by default.
        resume: Go on from the newest checkpoint in output_dir; without that, of the newest run in runs/.
        template: How conversations are written; auto is the model's own, or default.
        held_out: The share of conversations that is kept to measure with; 0 keeps none.
        seq_len: Tokens of a row; longer conversations are split between turns.
        training: How it is trained.
    """
    output_dir = run_folder("sft", output_dir, resume)
    torch.manual_seed(training.seed)
    chat_model = open_chat_model(model, template)
    train, valid = split(read(data, "sft"), held_out, training.seed)
    trainer = make_trainer(
        chat_model,
        fitted(train, seq_len, chat_model),
        fitted(valid, seq_len, chat_model) if valid else [],
        seq_len,
        training,
        output_dir,
        resume,
    )
    say(f"{len(train)} conversations, {len(valid)} held out; saved to {output_dir}")
    for metrics in trainer.steps(progress_bar=True):
        if "valid_loss" in metrics:
            say(f"step {metrics['step']}: held-out loss {metrics['valid_loss']:.3f} nats per token")
    result = trainer.finish()
    save(trainer, chat_model, output_dir)
    if trainer.accelerator.is_main_process:
        folder = quoted(output_dir)
        finish(
            result,
            output_dir,
            [
                ("talk with it", f"palm-rlhf chat {folder}"),
                ("serve it", f"palm-rlhf serve {folder}"),
                ("learn a reward", f"palm-rlhf reward RANKINGS --model {folder}"),
            ],
        )


@beartype
def make_trainer(
    model: ChatModel,
    train: list[Record],
    valid: list[Record],
    seq_len: int,
    training: SupervisedConfig,
    output_dir: Path,
    resume: bool,
) -> SupervisedTrainer:
    """The trainer on conversations, several of which share a row."""
    examples = examples_of(train, model)
    capacity = max(seq_len, *map(len, examples))  # words may be cut otherwise where messages meet
    return SupervisedTrainer(
        model.palm,
        train_data=examples,
        valid_data=examples_of(valid, model) if valid else None,
        sampler=PackedSampler([len(example) for example in examples], capacity, training.seed),
        config=training,
        output_dir=output_dir,
        resume=resume,
    )


@beartype
def save(trainer: SupervisedTrainer, model: ChatModel, output_dir: Path) -> None:
    """Merges the adapters, where some were trained, and writes the model with its tokenizer and template."""
    if trainer.config.lora_r:
        model.palm.merge_finetune_params(SCOPE)
    if trainer.accelerator.is_main_process:
        save_model(output_dir, *model)
