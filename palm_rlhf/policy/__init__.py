"""The policy of reinforcement learning, what judges it, and what it says."""
