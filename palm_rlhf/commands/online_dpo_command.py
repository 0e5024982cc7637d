"""The command ``palm-rlhf online-dpo``: train a model on preferences between its own replies, by rewards."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.commands.adapter_output import base_for_adapters, parts_to_save, refuse_other_kind
from palm_rlhf.commands.reward_arguments import has_functions, open_rewards, without_name
from palm_rlhf.commands.run_folder import finish_chat_model, run_folder, say
from palm_rlhf.commands.start_models import ModelName, TemplateName, open_chat_model
from palm_rlhf.commands.training_data import read_prompt_rows, split_prompts
from palm_rlhf.training.online_preference import OnlinePreferenceTrainer
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.preference_learner import SCOPE
from palm_rlhf.training.rollout_config import RolloutConfig


@beartype
def online_dpo(
    prompts: Annotated[Positional[Path], arg(metavar="PROMPTS")],
    *,
    model: ModelName,
    reward_model: Annotated[str | None, arg(metavar="MODEL")] = None,
    rewards: Annotated[tuple[str, ...], arg(metavar="NAME=SOURCE ...")] = (),
    output_dir: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    resume: bool = False,
    template: TemplateName = "auto",
    held_out: Annotated[float, arg(metavar="0..1")] = 0.1,
    merge: bool = True,
    rollouts: OmitArgPrefixes[RolloutConfig] = RolloutConfig(),  # noqa: B008 (it is frozen)
    training: OmitArgPrefixes[PreferenceConfig] = PreferenceConfig(),  # noqa: B008
) -> None:
    """Improve a model by DPO, or another --loss of pairs, on its own replies, which rewards compare.

    In each step the model replies --num-samples times to each prompt, and the best and the worst reply make a pair.
    Adapters (--lora-r) are merged at the end, or saved alone (--no-merge). The last line on standard output is JSON:
    valid_score and the other metrics of the replies to held-out prompts, steps, seconds, output_dir and model.

    Args:
        prompts: A text file with a prompt on each line (.txt), or records in any format that `palm-rlhf data convert`
            reads. Reward functions get the other fields of records with a prompt or a question.
        model: The model to improve, fine-tuned on conversations: its folder or .gguf file, the folder of a run, a hub
            id, or smollm2.
        reward_model: A reward model with the same tokenizer: its folder, the folder of a run, or a hub id.
        rewards: Named rewards, beside reward_model or in its place: functions as NAME=FILE.py:FUNCTION, reward models
            as NAME=FOLDER. --reward-weights sets their weights, and the weight of reward_model under this name.
        output_dir: Folder of the model, tokenizer, template, checkpoints, metrics and samples; by default a new one in
            runs/.
        resume: Continue from the newest checkpoint in output_dir; without output_dir, from the newest run in runs/.
        template: The chat template; auto is the model's own, or default.
        held_out: The share of prompts that is held out for evaluation; 0 holds out none.
        merge: Save the whole model, with the adapters merged; else the adapters alone, as a folder of PEFT that names
            MODEL as its base.
        rollouts: Sampling settings; if --eos-token is None, the end of the assistant's turn ends a reply.
        training: Training settings; sizes count pairs, one for each prompt, and kto is no loss of pairs.
    """
    output_dir = run_folder("online-dpo", output_dir, resume)
    refuse_other_kind(output_dir, merge)
    torch.manual_seed(training.seed)
    chat_model = open_chat_model(model, template)
    base = None if merge else base_for_adapters(model, chat_model, training.lora_r)
    judges = open_rewards(reward_model, rewards, chat_model, model)
    if rollouts.eos_token is None:
        rollouts = replace(rollouts, eos_token=chat_model.end_of_turn)
    rows = read_prompt_rows(prompts, chat_model, with_columns=has_functions(judges))
    train, valid = split_prompts(rows, held_out, training.seed)
    trainer = OnlinePreferenceTrainer(
        chat_model.palm,
        reward_model=without_name(judges),
        prompts=train,
        valid_prompts=valid or None,
        tokenizer=chat_model.tokenizer,
        config=training,
        rollouts=rollouts,
        output_dir=output_dir,
        resume=resume,
    )
    say(f"{len(train)} prompts, {len(valid)} held out; saved to {output_dir}")
    for metrics in trainer.steps(progress_bar=True):
        if "valid_score" in metrics:
            say(f"step {metrics['step']}: replies to held-out prompts score {metrics['valid_score']:.3f}")
    result = trainer.finish()
    parts = parts_to_save(chat_model, SCOPE, training.lora_r, base)
    if trainer.accelerator.is_main_process:
        finish_chat_model(result, output_dir, parts)
