"""The built-in model: a storyteller of a few million parameters, made from raw books by one recipe.

Four stages: learn a tokenizer, pretrain on books, tune on requests made from the stories, export a folder. Run it with
`python -m fastserve.train.storyteller configs/builtin.toml`. Importing this package loads neither torch nor
transformers.
"""
