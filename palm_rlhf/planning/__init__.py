"""How much memory a model takes to train or to serve, found without its weights."""
