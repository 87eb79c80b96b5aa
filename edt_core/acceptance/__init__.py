"""The acceptance of a machine: one command that proves the code on a GPU in minutes, and writes what it measured.

It needs torch, numpy, pyarrow, safetensors and filelock alone.
"""
