"""Which pairs of answers people compare, and which prompts are held out."""
