"""From raw text to a model folder: prepare data, learn a tokenizer, pretrain, fine-tune, evaluate, search.

The networks are transformers' own modules; what stands here is the corpus pipeline, the recipes, one training loop for
every objective and mesh, and the checks. Importing this package loads neither torch nor transformers.
"""
