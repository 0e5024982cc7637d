"""How good a model is.

The modules of this folder compute figures from stored judgments: win rates, ratings and their intervals. `judging` asks
judges and people, `measures` measures models, `reports` writes pages, and `commands` holds `palm-rlhf evaluate`.
"""
