"""Plain torch: a model, its initial values, its loss, its size. Nothing here knows how the work is shared out.

Letters in shapes: B batch, T tokens, D width, H heads, G key-value heads, K width of a head, F width of the
feed-forward layer, V vocabulary.
"""
