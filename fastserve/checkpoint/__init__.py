"""The model folder: find it, read it, stream its weights, and turn text into token ids and back."""
