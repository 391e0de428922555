"""Train a small language model from raw text to a model folder.

Four stages, one recipe file: learn a tokenizer, pretrain on books, tune on requests made from the stories, export a
Hugging Face folder. Run it with `python -m fastserve.train configs/builtin.toml`. Importing this package loads neither
torch nor transformers.
"""
