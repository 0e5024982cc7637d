"""Reinforcement learning from human feedback: prompts and a reward in, a better policy out."""
