"""Measurements of models: text prediction, accuracy on preferences, answer statistics, and runs of RLHF."""
