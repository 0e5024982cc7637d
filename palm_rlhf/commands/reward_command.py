"""The command ``palm-rlhf reward``: train a reward model on rankings."""

from pathlib import Path
from typing import Annotated

import torch
from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.commands.run_folder import finish, quoted, run_folder, save_model, say
from palm_rlhf.commands.start_models import ModelName, TemplateName, open_chat_model, quantize_base
from palm_rlhf.commands.training_data import rankings_of, read_records_for, split_held_out
from palm_rlhf.model.lora import ATTENTION, Targets
from palm_rlhf.model.quantised.quantised_weights import Quantisation
from palm_rlhf.policy.reward_model import Pooling, RewardModel
from palm_rlhf.training.reward import RewardModelTrainer
from palm_rlhf.training.reward_config import RewardConfig


@beartype
def reward(
    data: Annotated[Positional[Path], arg(metavar="RANKINGS")],
    *,
    model: ModelName,
    output_dir: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    resume: bool = False,
    template: TemplateName = "auto",
    held_out: Annotated[float, arg(metavar="0..1")] = 0.1,
    pooling: Pooling = "last",
    lora_r: int = 0,
    lora_targets: Targets = ATTENTION,
    normalise: bool = True,
    quantize: Quantisation | None = None,
    training: OmitArgPrefixes[RewardConfig] = RewardConfig(),  # noqa: B008 (it is frozen)
) -> None:
    """Train a reward model on rankings of replies, or on pairs of a chosen and a rejected one.

    The last line on standard output is JSON: valid_accuracy and the other metrics of the held-out rankings, steps,
    seconds, output_dir and model.

    Args:
        data: A file in any format that `palm-rlhf data convert` reads as rankings: Open-Assistant, HH, preferences.
        model: The model to start from, preferably fine-tuned: its folder or .gguf file, the folder of a run, a hub id,
            or smollm2.
        output_dir: Folder of the model, tokenizer, template, checkpoints and metrics; by default a new one in runs/.
        resume: Continue from the newest checkpoint in output_dir; without output_dir, from the newest run in runs/.
        template: The chat template; auto is the model's own, or default.
        held_out: The share of prompts that is held out for evaluation; 0 holds out none.
        pooling: Embedding that the score is computed from: the last token's, the mean over the reply, or over all
            tokens.
        lora_r: Rank of the adapters that are trained in place of the weights; 0 trains the weights.
        lora_targets: Matrices of each block that have adapters: q, k, v and out of the attention (q_proj, k_proj,
            v_proj and o_proj in PEFT), gate, value and ff_out of the feed-forward (gate_proj, up_proj and down_proj);
            all-linear is all of them.
        normalise: Shift and scale the scores to mean 0 and standard deviation 1 on the training data.
        quantize: Keep the frozen matrices below the adapters in int8, a byte a weight, or int4, 4.5 bits a weight
            (NF4), by bitsandbytes. The model that is saved has plain weights.
        training: Training settings.
    """
    if not lora_r and lora_targets != ATTENTION:
        targets = " ".join(lora_targets)
        raise ValueError(f"got --lora-targets {targets} without --lora-r, expected a rank: adapters have targets")
    output_dir = run_folder("reward", output_dir, resume)
    torch.manual_seed(training.seed)
    chat_model = open_chat_model(model, template)
    quantize_base(chat_model.palm, quantize, lora_r, "--lora-r")
    train, valid = (
        rankings_of(side, chat_model, training.max_seq_len)
        for side in split_held_out(read_records_for(data, "rankings"), held_out, training.seed)
    )
    reward_model = RewardModel(
        chat_model.palm,
        pooling=pooling,
        use_lora=lora_r > 0,
        lora_r=lora_r,
        lora_targets=lora_targets,
        share_base=lora_r > 0,
    )
    trainer = RewardModelTrainer(
        reward_model,
        train_data=train,
        valid_data=valid or None,
        config=training,
        output_dir=output_dir,
        resume=resume,
    )
    say(f"{len(train)} rankings, {len(valid)} held out; saved to {output_dir}")
    for metrics in trainer.steps(progress_bar=True):
        if "valid_accuracy" in metrics:
            say(f"step {metrics['step']}: ranks {metrics['valid_accuracy']:.1%} of the held-out pairs right")
    result = trainer.finish()
    if normalise:
        trainer.normalise(train)
    if trainer.accelerator.is_main_process:
        save_model(output_dir, trainer.reward_model, chat_model.tokenizer, chat_model.template)
        folder = quoted(output_dir)
        finish(
            result,
            output_dir,
            [
                ("improve a model", rlhf_command(model, folder, lora_r, quantize)),
                ("measure it", f"palm-rlhf evaluate reward {folder} PREFERENCES"),
            ],
        )


def rlhf_command(model: str, folder: str, lora_r: int, quantize: Quantisation | None) -> str:
    """Return the command that improves a model by its reward model, over one base where that one has adapters."""
    command = f"palm-rlhf rlhf PROMPTS --model {quoted(model)} --reward-model {folder}"
    if not lora_r:
        return command
    return f"{command} --actor-lora-r {lora_r} --share-base" + (f" --quantize {quantize}" if quantize else "")
