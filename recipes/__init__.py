"""Recipes: training offline and online, data sets, comparisons; see the README."""
