"""Fine-tuning: a model folder and a file of examples in, a model folder out. A module per kind of task."""
