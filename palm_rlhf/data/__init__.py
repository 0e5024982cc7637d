"""Text on its way to the model: corpora, and the stores of tokens behind them."""
