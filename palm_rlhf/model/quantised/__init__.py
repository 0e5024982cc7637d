"""Weights in fewer bits: their numbers and products, and the models that have them."""
