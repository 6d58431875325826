"""Ideas for the index and its budgets, measured on real weights before any of them is built.

Each is ours with one thing changed, as a patch over the package's reference backend, at equal bytes and equal budgets:
labels whose channels have several widths ("8x4+16x2": 8 channels of 4 bits, then 16 of 2), and rules that share a
budget out among the KV heads of a layer or of the model, or among queries ("blocks:share:model:query"). Several
changes at once are joined by a slash, "oracle" among them: exact keys for labels.
"""
