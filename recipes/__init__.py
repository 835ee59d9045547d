"""Recipes: training offline and online, data sets, comparisons; see the README."""

import os

# TorchRL, which reads this when it is imported, tells of every buffer otherwise.
os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")
# As Minari's downloads do, of every try; that all of them failed is told here.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
