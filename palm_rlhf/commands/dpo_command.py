"""The command ``palm-rlhf dpo``: train a model on preferences, without a reward model."""

from pathlib import Path
from typing import Annotated

import torch
from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.commands.adapter_output import base_for_adapters, parts_to_save, refuse_other_kind
from palm_rlhf.commands.run_folder import finish_chat_model, run_folder, say
from palm_rlhf.commands.start_models import (
    ModelName,
    TemplateName,
    open_chat_model,
    quantize_base,
)
from palm_rlhf.commands.training_data import preferences_of, read_records_for, split_held_out, unpaired_preferences_of
from palm_rlhf.model.quantised.quantised_weights import Quantisation
from palm_rlhf.training.preference import PreferenceTrainer
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.preference_learner import SCOPE


@beartype
def dpo(
    data: Annotated[Positional[Path], arg(metavar="PREFERENCES")],
    *,
    model: ModelName,
    output_dir: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    resume: bool = False,
    template: TemplateName = "auto",
    held_out: Annotated[float, arg(metavar="0..1")] = 0.1,
    quantize: Quantisation | None = None,
    merge: bool = True,
    training: OmitArgPrefixes[PreferenceConfig] = PreferenceConfig(),  # noqa: B008 (it is frozen)
) -> None:
    """Train a model on pairs of a chosen and a rejected reply by DPO, or another --loss; no reward model.

    The losses ipo, simpo and orpo learn from pairs too. kto learns from single replies with a label (wanted or not), or
    from the best and the worst reply of rankings. Adapters (--lora-r) are merged at the end, or saved alone
    (--no-merge). The last line on standard output is JSON: valid_accuracy and the other metrics of the held-out
    preferences, steps, seconds, output_dir and model.

    Args:
        data: A file in any format that `palm-rlhf data convert` reads as preferences (chosen and rejected, or
            rankings), for kto as unpaired (prompt, completion and label, or rankings).
        model: The model to start from, fine-tuned on conversations: its folder or .gguf file, the folder of a run, a
            hub id, or smollm2.
        output_dir: Folder of the model, tokenizer, template, checkpoints and metrics; by default a new one in runs/.
        resume: Continue from the newest checkpoint in output_dir; without output_dir, from the newest run in runs/.
        template: The chat template; auto is the model's own, or default.
        held_out: The share of prompts that is held out for evaluation; 0 holds out none.
        quantize: Keep the frozen matrices below the adapters in int8, a byte a weight, or int4, 4.5 bits a weight
            (NF4), by bitsandbytes. The model that is saved has plain weights, with the adapters merged.
        merge: Save the whole model, with the adapters merged; else the adapters alone, as a folder of PEFT that names
            MODEL as its base.
        training: Training settings.
    """
    output_dir = run_folder("dpo", output_dir, resume)
    refuse_other_kind(output_dir, merge)
    torch.manual_seed(training.seed)
    chat_model = open_chat_model(model, template)
    quantize_base(chat_model.palm, quantize, training.lora_r, "--lora-r")
    base = None if merge else base_for_adapters(model, chat_model, training.lora_r)
    records = read_records_for(data, "preferences" if training.is_paired else "unpaired")
    train, valid = (
        preferences_of(side, chat_model, training.max_seq_len)
        if training.is_paired
        else unpaired_preferences_of(side, chat_model)
        for side in split_held_out(records, held_out, training.seed)
    )
    trainer = PreferenceTrainer(
        chat_model.palm,
        train_data=train,
        valid_data=valid or None,
        config=training,
        output_dir=output_dir,
        resume=resume,
    )
    kind = "pairs" if training.is_paired else "replies"
    success = "prefers the chosen reply of" if training.is_paired else "tells wanted from unwanted in"
    say(f"{len(train)} {kind}, {len(valid)} held out; saved to {output_dir}")
    for metrics in trainer.steps(progress_bar=True):
        if "valid_accuracy" in metrics:
            say(f"step {metrics['step']}: {success} {metrics['valid_accuracy']:.1%} of held-out {kind}")
    result = trainer.finish()
    parts = parts_to_save(chat_model, SCOPE, training.lora_r, base)
    if trainer.accelerator.is_main_process:
        finish_chat_model(result, output_dir, parts)
