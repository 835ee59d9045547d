"""Recipes: training offline and online, data sets, comparisons; see the README."""

import os

# TorchRL, which reads this when it is imported, tells of every buffer otherwise.
os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")
