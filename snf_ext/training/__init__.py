"""Training and measuring flows: data, loop, checkpoints, evaluation, pictures.

Importing this package needs torch alone. What needs more says so in one line when it is used:
the extras come with ``pip install "snf_ext[train]"``.
"""
