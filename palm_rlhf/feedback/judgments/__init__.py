"""Judgments of answers: votes, thumbs and better answers, each given once, shown, and taken back."""
