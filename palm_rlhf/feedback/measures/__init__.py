"""Measures of the collected feedback: win rates, agreement, reliability, coverage and contributions."""
