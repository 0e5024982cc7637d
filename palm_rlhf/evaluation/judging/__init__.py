"""Questions to judges and people about the answers of models, and their stored judgments."""
