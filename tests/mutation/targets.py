"""Which modules are mutated, by which tests their mutants are to be killed, and which mutants nothing can kill."""

# A module belongs to the first pattern that it matches; the tests that are the likeliest to fail come first.
TESTS = {
    "palm_rlhf/algorithms/*.py": ["tests/algorithms"],
    "palm_rlhf/policy/*.py": ["tests/policy", "tests/training/test_rlhf.py"],
    "palm_rlhf/ops/sampling.py": ["tests/ops/test_sampling.py", "tests/policy/test_rollout.py"],
    "palm_rlhf/ops/logprobs.py": ["tests/ops/test_losses.py", "tests/policy/test_sequences.py"],
    "palm_rlhf/training/rlhf/*.py": [
        "tests/training/test_rlhf.py",
        "tests/training/test_rlhf_text.py",
        "tests/training/test_rlhf_resume.py",
        "tests/training/test_resumed_settings.py",
    ],
    "palm_rlhf/training/preference*.py": [
        "tests/training/test_preference.py",
        "tests/training/test_preference_runs.py",
    ],
    "palm_rlhf/training/reward*.py": [
        "tests/training/test_reward_metrics.py",
        "tests/training/test_reward_trainer.py",
        "tests/training/test_reward_runs.py",
    ],
    "palm_rlhf/training/supervised*.py": ["tests/training/test_supervised.py"],
    "palm_rlhf/training/windows.py": ["tests/training/test_windows.py"],
}

# Mutants that change nothing a test could observe: file, the line before, the line after, and the reason.
EQUIVALENT: list[tuple[str, str, str, str]] = []
