"""Plain torch: models, their initial values, their loss and their size. Nothing here knows how the work is distributed.

Letters in shapes: B sequences, T tokens of each (Tq queries, Tk keys), N tokens in all, D model width, H heads, G key-value
heads, K head width, F feed-forward width, E experts, k experts per token, V vocabulary.
"""
