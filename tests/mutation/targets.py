"""Which modules are mutated, by which tests their mutants are to be killed, and which mutants nothing can kill."""

# A module belongs to the first pattern that it matches; the tests that are the likeliest to fail come first.
TESTS = {
    "palm_rlhf/algorithms/*.py": ["tests/algorithms"],
    "palm_rlhf/policy/reward*.py": [
        "tests/policy/test_reward.py",
        "tests/policy/test_rewards.py",
        "tests/policy/test_actor_critic.py",
        "tests/policy/test_padded_vocabulary.py",
    ],
    "palm_rlhf/policy/turns.py": ["tests/policy/test_turns.py", "tests/training/test_rlhf_turns.py"],
    "palm_rlhf/policy/*.py": ["tests/policy", "tests/training/test_rlhf.py"],
    "palm_rlhf/ops/nucleus.py": [
        "tests/ops/test_nucleus.py",
        "tests/ops/test_sampling.py",
        "tests/policy/test_sequences.py",
    ],
    "palm_rlhf/ops/sampling.py": ["tests/ops/test_sampling.py", "tests/ops/test_nucleus.py", "tests/policy"],
    "palm_rlhf/ops/logprobs.py": [
        "tests/ops/test_losses.py",
        "tests/ops/test_logprobs.py",
        "tests/policy/test_sequences.py",
    ],
    "palm_rlhf/training/rlhf/token_table.py": ["tests/training/test_token_table.py"],
    "palm_rlhf/training/rlhf/prompts.py": ["tests/training/test_rlhf_text.py", "tests/training/test_rlhf_rewards.py"],
    "palm_rlhf/training/rlhf/evaluation.py": ["tests/training/test_rlhf_evaluation.py"],
    "palm_rlhf/training/rlhf/dynamic_sampling.py": ["tests/training/test_dynamic_sampling.py"],
    "palm_rlhf/training/rlhf/config*.py": [
        "tests/training/test_defaults.py",
        "tests/training/test_config_bounds.py",
        "tests/training/test_rlhf.py",
        "tests/training/test_rlhf_variants.py",
        "tests/training/laws/test_rlhf_by_definition.py",
        "tests/training/laws/test_rlhf_loop.py",
        "tests/training/test_resumed_settings.py",
    ],
    "palm_rlhf/training/rlhf/reward_keywords.py": [
        "tests/training/test_rlhf_rewards.py",
        "tests/training/test_rlhf_text.py",
        "tests/training/test_rlhf_turns.py",
        "tests/training/test_rlhf.py",
        "tests/training/test_rlhf_variants.py",
        "tests/training/laws/test_rlhf_loop.py",
    ],
    "palm_rlhf/training/rlhf/running_moments.py": [
        "tests/training/test_rlhf.py",
        "tests/training/test_rlhf_resume.py",
    ],
    "palm_rlhf/training/rlhf/checkpoint.py": [
        "tests/training/test_rlhf_resume.py",
        "tests/training/test_rlhf.py",
        "tests/training/test_rlhf_variants.py",
        "tests/training/laws/test_rlhf_loop.py",
        "tests/training/test_resumed_settings.py",
    ],
    "palm_rlhf/training/rlhf/*.py": [
        "tests/training/laws/test_rlhf_by_definition.py",
        "tests/training/laws/test_rlhf_loop.py",
        "tests/training/laws/test_optimiser.py",
        "tests/training/test_rlhf.py",
        "tests/training/test_rlhf_variants.py",
        "tests/training/test_rlhf_text.py",
        "tests/training/test_rlhf_rewards.py",
        "tests/training/test_rlhf_turns.py",
        "tests/training/test_rlhf_resume.py",
        "tests/training/test_resumed_settings.py",
        "tests/training/test_first_step.py",
    ],
    "palm_rlhf/training/online_preference.py": ["tests/training/test_online_preference.py"],
    "palm_rlhf/training/preference_learner.py": [
        "tests/training/laws/test_fields_without_rollouts.py",
        "tests/training/test_preference_losses.py",
        "tests/training/test_preference.py",
        "tests/training/test_preference_runs.py",
        "tests/training/test_online_preference.py",
    ],
    "palm_rlhf/training/preference*.py": [
        "tests/training/test_defaults.py",
        "tests/training/test_config_bounds.py",
        "tests/training/laws/test_fields_without_rollouts.py",
        "tests/training/test_preference_losses.py",
        "tests/training/test_preference.py",
        "tests/training/test_preference_runs.py",
    ],
    "palm_rlhf/training/reward*.py": [
        "tests/training/test_defaults.py",
        "tests/training/test_config_bounds.py",
        "tests/training/laws/test_fields_without_rollouts.py",
        "tests/training/test_reward_metrics.py",
        "tests/training/test_reward_trainer.py",
        "tests/training/test_reward_runs.py",
    ],
    "palm_rlhf/training/supervised*.py": [
        "tests/training/test_defaults.py",
        "tests/training/test_config_bounds.py",
        "tests/training/laws/test_fields_without_rollouts.py",
        "tests/training/test_supervised.py",
    ],
    "palm_rlhf/training/sampling_config.py": [
        "tests/training/test_defaults.py",
        "tests/training/test_config_bounds.py",
        "tests/training/test_online_preference.py",
        "tests/training/test_rlhf.py",
    ],
    "palm_rlhf/training/rollout_config.py": [
        "tests/training/test_defaults.py",
        "tests/training/test_config_bounds.py",
        "tests/training/test_online_preference.py",
    ],
    "palm_rlhf/training/run/config.py": [
        "tests/training/test_defaults.py",
        "tests/training/test_config_bounds.py",
        "tests/training/test_config.py",
        "tests/training/laws/test_fields_without_rollouts.py",
        "tests/training/laws/test_run.py",
    ],
    "palm_rlhf/training/language_model*.py": [
        "tests/training/test_language_model.py",
        "tests/training/laws/test_fields_without_rollouts.py",
        "tests/training/test_defaults.py",
        "tests/training/test_config_bounds.py",
        "tests/training/test_config.py",
        "tests/training/laws/test_run.py",
    ],
    "palm_rlhf/training/run/optimizer.py": [
        "tests/training/test_optimization.py",
        "tests/training/laws/test_optimiser.py",
        "tests/training/test_first_step.py",
    ],
    "palm_rlhf/training/epoch_sampler.py": ["tests/training/test_batches.py"],
    "palm_rlhf/training/token_windows.py": ["tests/training/test_windows.py"],
}

# Mutants that change nothing a test could observe: file, line before and line after (without a comment), reason.
EQUIVALENT = [
    *(
        ("palm_rlhf/ops/nucleus.py", before, before.replace(*change), "how many tokens are sorted or counted at once")
        for before, *changes in (
            ("SORTED = 2048", ("48", "49"), ("48", "47")),
            ("BINS = 1024", ("24", "25"), ("24", "23")),
            (
                "CHUNK = 1 << 18",
                *((" 18", " 19"), (" 18", " 17"), ("1 <", "2 <"), ("1 <", "0 <"), ("<<", ">>")),
            ),
        )
        for change in changes
    ),
    (
        "palm_rlhf/policy/reward_model.py",
        "has_bias = num_binned_output > 0",
        "has_bias = num_binned_output > 1",
        "one bin is refused",
    ),
    (
        "palm_rlhf/algorithms/advantages.py",
        "centred = torch.where(varied & valid, scores - scores.sum(dim=-1, keepdim=True) / count.clamp(min=1), 0.0)",
        "centred = torch.where(varied & valid, scores - scores.sum(dim=-1, keepdim=True) / count.clamp(min= 0), 0.0)",
        "a group without valid scores gets 0, whatever its mean is",
    ),
    (
        "palm_rlhf/training/rlhf/token_table.py",
        "above, below = ratio > 1 + variant.clip_eps_high, ratio < 1 - variant.clip_eps",
        "above, below = ratio >= 1 + variant.clip_eps_high, ratio < 1 - variant.clip_eps",
        "at the bound itself the clipped and the free ratio are the same",
    ),
    (
        "palm_rlhf/policy/turns.py",
        "truncated: bool = False",
        "truncated: bool = True",
        "it is set at the end of every turn, and every conversation has one",
    ),
    (
        "palm_rlhf/training/rlhf/metrics.py",
        "return self.finished[-1][name] if self.finished else 0.0",
        "return self.finished[-1][name] if self.finished else -1.0",
        "it is compared with early_stop_kl, which is above 0",
    ),
    (
        "palm_rlhf/ops/nucleus.py",
        "return Cut(floor, torch.full_like(floor, logits.shape[-1] - 1, dtype=torch.int64))",
        "return Cut(floor, torch.full_like(floor, logits.shape[-1] - 0, dtype=torch.int64))",
        "no token has an id above the last one",
    ),
    (
        "palm_rlhf/ops/sampling.py",
        "return certain.scatter_(-1, logits.argmax(dim=-1, keepdim=True), 0.0)",
        "return certain.scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)",
        "softmax is the same for any finite logit beside minus infinities",
    ),
    (
        "palm_rlhf/ops/nucleus.py",
        "return Cut(floor, torch.full_like(floor, logits.shape[-1] - 1, dtype=torch.int64))",
        "return Cut(floor, torch.full_like(floor, logits.shape[-1] + 1, dtype=torch.int64))",
        "no token has an id above the last one",
    ),
    (
        "palm_rlhf/algorithms/advantages.py",
        "centred = torch.where(varied & valid, scores - scores.sum(dim=-1, keepdim=True) / count.clamp(min=1), 0.0)",
        "centred = torch.where(varied & valid, scores - scores.sum(dim=-1, keepdim=True) / count.clamp(min= 2), 0.0)",
        "a group of fewer than two valid scores does not vary",
    ),
    (
        "palm_rlhf/policy/sequences.py",
        "device = rows[0].device",
        "device = rows[ -1].device",
        "all rows are on one device",
    ),
    (
        "palm_rlhf/training/preference.py",
        "num_steps = -(-len(items) // self.items_per_step)",
        "num_steps = -(~len(items) // self.items_per_step)",
        "a step of the second epoch is drawn as well, and left out",
    ),
    (
        "palm_rlhf/training/preference_objective.py",
        'return cls(len(items), sum(getattr(item, "desirable", False) for item in items))',
        'return cls(len(items), sum(getattr(item, "desirable", True) for item in items))',
        "pairs have no such field, and nothing asks how many of them are desirable",
    ),
    (
        "palm_rlhf/ops/nucleus.py",
        'sorts = rows.shape[-1] < SORTED or rows.device.type != "cpu" or torch.compiler.is_compiling()',
        'sorts = rows.shape[-1] >= SORTED or rows.device.type != "cpu" or torch.compiler.is_compiling()',
        "both ways find the same cut, and differ in speed alone",
    ),
    (
        "palm_rlhf/ops/nucleus.py",
        "follower = ordered.gather(-1, num_kept.clamp(max=ordered.shape[-1] - 1))",
        "follower = ordered.gather(1, num_kept.clamp(max=ordered.shape[-1] - 1))",
        "the logits have two dimensions there",
    ),
]
