"""Benchmarks of snf_ext against fair baselines, all measured interleaved in one process.

``python -m bench.compare figure4|linear|conv|...`` prints the tables, ``python -m bench.mnist``
trains on MNIST beside the public code's curve, ``pytest bench`` times the same steps one by one,
``bench/gpu.sh`` builds, tests and measures on a machine with a GPU.
"""
