"""What only the built-in model needs: its texts and chats made from raw books, and the scores and card of the result.

Everything between is done by the commands that any model is trained with: examples/builtin_model.sh has them in order.
Importing this package loads neither torch nor transformers.
"""
