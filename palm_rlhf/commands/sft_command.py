"""The command ``palm-rlhf sft``: fine-tune a model on conversations."""

from pathlib import Path
from typing import Annotated

import torch
from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.commands.adapter_output import base_for_adapters, parts_to_save, refuse_other_kind
from palm_rlhf.commands.run_folder import finish_chat_model, quoted, run_folder, say
from palm_rlhf.commands.start_models import (
    ChatModel,
    ModelName,
    TemplateName,
    open_chat_model,
    quantize_base,
)
from palm_rlhf.commands.training_data import examples_of, fit_to_context, read_records_for, split_held_out
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.packing import PackedSampler
from palm_rlhf.model.quantised.quantised_weights import Quantisation
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
    quantize: Quantisation | None = None,
    merge: bool = True,
    training: OmitArgPrefixes[SupervisedConfig] = SupervisedConfig(),  # noqa: B008 (it is frozen)
) -> None:
    """Fine-tune a model on conversations; adapters (--lora-r) are merged at the end, or saved alone (--no-merge).

    The last line on standard output is JSON: valid_loss in nats per token, steps, seconds, output_dir and model.

    Args:
        data: A file in any format that `palm-rlhf data convert` reads: Open-Assistant, ShareGPT, messages, preferences.
        model: The model to start from, with its tokenizer and template: its folder or .gguf file, the folder of a run,
            a hub id, or smollm2.
        output_dir: Folder of the model, tokenizer, template, checkpoints and metrics; by default a new one in runs/.
        resume: Continue from the newest checkpoint in output_dir; without output_dir, from the newest run in runs/.
        template: The chat template; auto is the model's own, or default.
        held_out: The share of conversations that is held out for evaluation; 0 holds out none.
        seq_len: Length of a row in tokens; longer conversations are split between turns.
        quantize: Keep the frozen matrices below the adapters in int8, a byte a weight, or int4, 4.5 bits a weight
            (NF4), by bitsandbytes. The model that is saved has plain weights, with the adapters merged.
        merge: Save the whole model, with the adapters merged; else the adapters alone, as a folder of PEFT that names
            MODEL as its base.
        training: Training settings.
    """
    output_dir = run_folder("sft", output_dir, resume)
    refuse_other_kind(output_dir, merge)
    torch.manual_seed(training.seed)
    chat_model = open_chat_model(model, template)
    quantize_base(chat_model.palm, quantize, training.lora_r, "--lora-r")
    base = None if merge else base_for_adapters(model, chat_model, training.lora_r, training.lora_embeddings)
    train, valid = split_held_out(read_records_for(data, "sft"), held_out, training.seed)
    trainer = make_trainer(
        chat_model,
        fit_to_context(train, seq_len, chat_model),
        fit_to_context(valid, seq_len, chat_model) if valid else [],
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
    parts = parts_to_save(chat_model, SCOPE, training.lora_r, base)
    if trainer.accelerator.is_main_process:
        learn_reward = f"palm-rlhf reward RANKINGS --model {quoted(output_dir)}"
        finish_chat_model(result, output_dir, parts, [("learn a reward", learn_reward)])


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
    """Return a trainer on conversations, several of which share a row."""
    examples = examples_of(train, model)
    capacity = max(seq_len, *map(len, examples))  # messages joined can have more tokens than counted one by one
    return SupervisedTrainer(
        model.palm,
        train_data=examples,
        valid_data=examples_of(valid, model) if valid else None,
        sampler=PackedSampler([len(example) for example in examples], capacity, training.seed),
        config=training,
        output_dir=output_dir,
        resume=resume,
    )
