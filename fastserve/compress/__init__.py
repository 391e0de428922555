"""Make a model folder smaller and faster, and measure what it lost.

A recipe is a list of steps, each of which turns one model folder into another: `recipe.py` says which steps there are,
`run.py` runs them, one layer at a time. Every method is one file with functions on plain matrices, which can be used
without the rest. Importing this package loads neither torch nor transformers.
"""
