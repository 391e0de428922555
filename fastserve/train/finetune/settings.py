"""The options of `fastserve finetune`: a field here is a flag, a TOML key and a keyword."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.core.errors import ConfigError

TASKS = (
    "instruction",
    "preference",
    "question-answering",
    "classification",
    "token-classification",
    "seq2seq",
    "embedding",
)


@dataclass(frozen=True, slots=True)
class FinetuneSettings:
    """How to tune, and where the examples keep what.

    Attributes:
        validation: file of examples to measure with; a share of the data without it.
        validation_share: that share.
        evaluate_examples: examples to measure at most; 0: all.
        epochs: passes over the examples.
        steps: steps instead of epochs; 0: by epochs.
        batch_size: examples (rows, where they are packed) in a step.
        micro_batch_size: examples in one pass; 0: all of the step.
        group_by_length: put examples of like length into a batch, which leaves little padding; where the length tells
            the label, batches become one-sided.
        max_length: longest input in tokens; at most the positions that the network has.
        optimizer: adamw, or muon (of the hidden matrices; AdamW moves the rest), for networks that saw little before.
        learning_rate: the peak; LoRA takes about ten times as much as tuning all weights.
        muon_learning_rate: the peak of what Muon moves; 0: the same.
        weight_decay: of the matrices.
        warmup_share: share of the steps in which the rate rises.
        precision: float32, bfloat16, or float16 with a scaled loss.
        gradient_checkpointing: compute activations twice to save their memory.
        dtype: of the exported weights: float32 or bfloat16.
        lora_rank: tune low-rank additions of this rank instead of all weights; 0: all weights.
        lora_alpha: their scale; 0: twice the rank.
        lora_dropout: their dropout.
        lora_targets: modules that get them; all linear ones when not given.
        dora: split weights into size and direction too (DoRA).
        qlora: hold the weights that the additions are tuned on in 4 bits (QLoRA); needs lora_rank.
        merge: export whole weights with the additions merged; else an adapter folder is written beside.
        packing: fill rows with several conversations, which do not attend to each other (instruction).
        chat_template: file with a chat template, for models that have none (instruction, preference).
        beta: how far preferences may move the model from where it began (preference).
        stride: tokens that two windows of a long text share (question-answering).
        max_answer_tokens: longest answer (question-answering, seq2seq); 0: 30, and max_length in seq2seq.
        source_prefix: text before every source, such as "translate English to Chinese: " (seq2seq).
        text_key, label_key: where an example keeps text and label (classification, token-classification).
        source_key, target_key: where a pair keeps its two texts (seq2seq; embedding: anchor and positive).
        temperature: of the contrast (embedding).
        seed: of the order of examples and of new weights.
    """

    validation: str = ""
    validation_share: float = 0.1
    evaluate_examples: int = 500
    epochs: float = 3.0
    steps: int = 0
    batch_size: int = 16
    micro_batch_size: int = 0
    group_by_length: bool = False
    max_length: int = 512
    optimizer: str = "adamw"
    learning_rate: float = 5e-5
    muon_learning_rate: float = 0.0
    weight_decay: float = 0.01
    warmup_share: float = 0.06
    precision: str = "bfloat16"
    gradient_checkpointing: bool = False
    dtype: str = "float32"
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    dora: bool = False
    qlora: bool = False
    merge: bool = True
    packing: bool = True
    chat_template: str = ""
    beta: float = 0.1
    stride: int = 128
    max_answer_tokens: int = 0
    source_prefix: str = ""
    text_key: str = "text"
    label_key: str = "label"
    source_key: str = "source"
    target_key: str = "target"
    temperature: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("precision", ("float32", "bfloat16", "float16")),
            ("dtype", ("float32", "bfloat16")),
            ("optimizer", ("adamw", "muon")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name, low in (("batch_size", 1), ("max_length", 8), ("epochs", 0), ("steps", 0), ("lora_rank", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, not {getattr(self, name)}")
        for name in ("dora", "qlora"):
            if getattr(self, name) and not self.lora_rank:
                raise ConfigError(f"{name} is a form of LoRA: give lora_rank too")
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share must lie between 0 and 1, not {self.validation_share}")
