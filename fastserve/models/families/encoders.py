"""The table of native encoders: class name stem, such as Bert -> config, names by role, and heads by class name suffix.

A family made of known parts is one entry: a function from config.json to `EncoderConfig`, the names of its modules, and
for each head (`ForQuestionAnswering`, ...) what lies between hidden states and scores. What the parts cannot do is
refused by `CheckpointError`; transformers then runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastserve.core.errors import CheckpointError
from fastserve.models.encoder import EncoderConfig, HeadConfig
from fastserve.models.families.family import activation, number, refuse_unless
from fastserve.models.rope import read_rope

_BERT_NAMES = {
    "embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "type_embedding": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "query": "encoder.layer.{layer}.attention.self.query",
    "key": "encoder.layer.{layer}.attention.self.key",
    "value": "encoder.layer.{layer}.attention.self.value",
    "attention_output": "encoder.layer.{layer}.attention.output.dense",
    "attention_norm": "encoder.layer.{layer}.attention.output.LayerNorm",
    "up": "encoder.layer.{layer}.intermediate.dense",
    "down": "encoder.layer.{layer}.output.dense",
    "mlp_norm": "encoder.layer.{layer}.output.LayerNorm",
}
_ELECTRA_NAMES = {**_BERT_NAMES, "embedding_projection": "embeddings_project"}
_MPNET_NAMES = {
    **_BERT_NAMES,
    "query": "encoder.layer.{layer}.attention.attn.q",
    "key": "encoder.layer.{layer}.attention.attn.k",
    "value": "encoder.layer.{layer}.attention.attn.v",
    "attention_output": "encoder.layer.{layer}.attention.attn.o",
    "attention_norm": "encoder.layer.{layer}.attention.LayerNorm",
    "relative_bias": "encoder.relative_attention_bias",
}
_ALBERT_LAYER = "encoder.albert_layer_groups.{layer}.albert_layers.0."
_ALBERT_NAMES = {
    **{role: name for role, name in _BERT_NAMES.items() if role.endswith(("embedding", "embedding_norm"))},
    "embedding_projection": "encoder.embedding_hidden_mapping_in",
    "query": _ALBERT_LAYER + "attention.query",
    "key": _ALBERT_LAYER + "attention.key",
    "value": _ALBERT_LAYER + "attention.value",
    "attention_output": _ALBERT_LAYER + "attention.dense",
    "attention_norm": _ALBERT_LAYER + "attention.LayerNorm",
    "up": _ALBERT_LAYER + "ffn",
    "down": _ALBERT_LAYER + "ffn_output",
    "mlp_norm": _ALBERT_LAYER + "full_layer_layer_norm",
}
_DISTILBERT_NAMES = {
    **{role: name for role, name in _BERT_NAMES.items() if role.endswith(("embedding", "embedding_norm"))},
    "query": "transformer.layer.{layer}.attention.q_lin",
    "key": "transformer.layer.{layer}.attention.k_lin",
    "value": "transformer.layer.{layer}.attention.v_lin",
    "attention_output": "transformer.layer.{layer}.attention.out_lin",
    "attention_norm": "transformer.layer.{layer}.sa_layer_norm",
    "up": "transformer.layer.{layer}.ffn.lin1",
    "down": "transformer.layer.{layer}.ffn.lin2",
    "mlp_norm": "transformer.layer.{layer}.output_layer_norm",
}
_MODERNBERT_NAMES = {
    "embedding": "embeddings.tok_embeddings",
    "embedding_norm": "embeddings.norm",
    "attention_norm": "layers.{layer}.attn_norm",
    "query_key_value": "layers.{layer}.attn.Wqkv",
    "attention_output": "layers.{layer}.attn.Wo",
    "mlp_norm": "layers.{layer}.mlp_norm",
    "gate_up": "layers.{layer}.mlp.Wi",
    "down": "layers.{layer}.mlp.Wo",
    "final_norm": "final_norm",
}


@dataclass(frozen=True, slots=True)
class HeadNames:
    """A head of a family. A name that begins with a dot is one of the encoder itself.

    Attributes:
        output, dense, norm: modules on disk; "" where there is none.
        pool: as in `HeadConfig`; None takes what the config says (`classifier_pooling`).
        activation: ours or tanh; "" takes the config's own.
        is_tied: `output` has the token embedding's matrix, and a bias of its own.
    """

    output: str
    dense: str = ""
    norm: str = ""
    pool: str | None = ""
    activation: str = ""
    is_tied: bool = False


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """One row of the table. `prefix` is what names begin with when a head is in the folder."""

    read_config: Callable[[Mapping[str, Any]], EncoderConfig]
    names: Mapping[str, str]
    prefix: str
    heads: Mapping[str, HeadNames]
    ignored: tuple[str, ...] = field(
        default=(r".*position_ids", r".*pooler\..*", r"cls\.seq_relationship\..*", r".*\.decoder\.(weight|bias)")
    )

    def head(self, suffix: str, config: Mapping[str, Any], encoder: EncoderConfig) -> HeadConfig | None:
        """What a head computes; None for a bare encoder."""
        names = self.heads.get(suffix)
        if names is None:
            return None
        counts = {MASKED: encoder.vocab_size, QUESTION: 2}
        if suffix == MASKED:
            refuse_unless(config, tie_word_embeddings=True)
        pool = names.pool if names.pool is not None else str(config.get("classifier_pooling", "cls"))
        dense_size = encoder.embedding_size if suffix == MASKED and encoder.embedding_size else encoder.hidden_size
        return HeadConfig(
            pool=pool,
            num_outputs=counts.get(suffix) or num_labels(config),
            dense_size=dense_size if names.dense else 0,
            activation=names.activation or encoder.activation,
            dense_bias=bool(config.get("classifier_bias", not encoder.norms_first)),
            norm=encoder.norm if names.norm else "",
            is_tied=names.is_tied,
        )


MASKED, QUESTION = "ForMaskedLM", "ForQuestionAnswering"
SEQUENCE, TOKENS = "ForSequenceClassification", "ForTokenClassification"
BARE = ("Model", "ForPreTraining")


def num_labels(config: Mapping[str, Any]) -> int:
    """Labels of a classifier, as transformers counts them."""
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, Mapping) and labels else int(number(config, "num_labels", default=2))


def _fields(config: Mapping[str, Any], **differences: Any) -> EncoderConfig:
    """BERT's config; `differences` are fields of EncoderConfig."""
    refuse_unless(config, is_decoder=False, add_cross_attention=False)
    refuse_unless(
        {"position_embedding_type": config.get("position_embedding_type")}, position_embedding_type="absolute"
    )
    num_layers = int(number(config, "num_hidden_layers", "n_layers"))
    num_heads = int(number(config, "num_attention_heads", "n_heads"))
    hidden_size = int(number(config, "hidden_size", "dim"))
    if num_heads < 1 or hidden_size % num_heads:
        raise CheckpointError(f"hidden_size {hidden_size} is no multiple of {num_heads} attention heads")
    positions = int(number(config, "max_position_embeddings"))
    fields = dict(
        vocab_size=int(number(config, "vocab_size")),
        hidden_size=hidden_size,
        inner_size=int(number(config, "intermediate_size", "hidden_dim")),
        num_layers=num_layers,
        num_heads=num_heads,
        head_size=hidden_size // num_heads,
        max_positions=positions,
        num_learned_positions=positions,
        num_types=int(number(config, "type_vocab_size", default=2)),
        norm_epsilon=float(number(config, "layer_norm_eps", default=1e-12)),
        activation=activation(config, "hidden_act", "activation", default="gelu"),
        layer_of=tuple(range(num_layers)),
        windows=(0,) * num_layers,
        ropes=(None,) * num_layers,
    )
    return EncoderConfig(**{**fields, **differences})


def _read_roberta(config: Mapping[str, Any], **differences: Any) -> EncoderConfig:
    """Positions begin after the row of the padding token."""
    positions, offset = (
        int(number(config, "max_position_embeddings")),
        int(number(config, "pad_token_id", default=1)) + 1,
    )
    return _fields(config, position_offset=offset, max_positions=positions - offset, **differences)


def _read_albert(config: Mapping[str, Any]) -> EncoderConfig:
    refuse_unless(config, inner_group_num=1)
    num_layers, num_groups = (
        int(number(config, "num_hidden_layers")),
        int(number(config, "num_hidden_groups", default=1)),
    )
    return _fields(
        {"hidden_act": "gelu_new", **config},
        embedding_size=int(number(config, "embedding_size", default=128)),
        layer_of=tuple(layer * num_groups // num_layers for layer in range(num_layers)),
    )


def _read_distilbert(config: Mapping[str, Any]) -> EncoderConfig:
    return _fields(config, num_types=0, norm_epsilon=1e-12)


def _read_electra(config: Mapping[str, Any]) -> EncoderConfig:
    return _fields(config, embedding_size=int(number(config, "embedding_size", default=128)))


def _read_mpnet(config: Mapping[str, Any]) -> EncoderConfig:
    buckets = int(number(config, "relative_attention_num_buckets", default=32))
    return _read_roberta({**config, "pad_token_id": 1}, num_types=0, num_buckets=buckets)


def _read_modernbert(config: Mapping[str, Any]) -> EncoderConfig:
    refuse_unless(config, sparse_prediction=False, decoder_bias=True)
    num_layers = int(number(config, "num_hidden_layers"))
    every = int(number(config, "global_attn_every_n_layers", default=3))
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer % every else "full_attention" for layer in range(num_layers)
    ]
    head_size = int(number(config, "hidden_size")) // max(1, int(number(config, "num_attention_heads")))
    thetas = {
        "full_attention": float(number(config, "global_rope_theta", default=160_000.0)),
        "sliding_attention": float(config.get("local_rope_theta") or 10_000.0),
    }
    ropes = {kind: read_rope(config, head_size, kind, theta) for kind, theta in thetas.items()}
    windows = {"full_attention": 0, "sliding_attention": int(number(config, "local_attention", default=128)) // 2 + 1}
    if len(kinds) != num_layers or set(kinds) - set(windows):
        raise CheckpointError(f"config.json: layer_types has {len(kinds)} entries of kinds {sorted(set(kinds))}")
    return _fields(
        {"hidden_act": config.get("hidden_activation") or "gelu", **config},
        num_learned_positions=0,
        num_types=0,
        norm_epsilon=float(number(config, "norm_eps", default=1e-5)),
        norm="layer" if config.get("norm_bias") else "layer-no-bias",
        norms_first=True,
        first_norm=False,
        mlp="gated",
        bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        windows=tuple(windows[kind] for kind in kinds),
        ropes=tuple(ropes[kind] for kind in kinds),
    )


_PLAIN = {QUESTION: HeadNames("qa_outputs"), TOKENS: HeadNames("classifier")}
_ROBERTA_HEADS = {
    **_PLAIN,
    SEQUENCE: HeadNames("classifier.out_proj", "classifier.dense", pool="cls", activation="tanh"),
    MASKED: HeadNames("lm_head", "lm_head.dense", "lm_head.layer_norm", activation="gelu", is_tied=True),
}
_ROBERTA = EncoderFamily(_read_roberta, _BERT_NAMES, "roberta.", _ROBERTA_HEADS)

ENCODERS: dict[str, EncoderFamily] = {
    "Bert": EncoderFamily(
        _fields,
        _BERT_NAMES,
        "bert.",
        {
            **_PLAIN,
            SEQUENCE: HeadNames("classifier", ".pooler.dense", pool="cls", activation="tanh"),
            MASKED: HeadNames(
                "cls.predictions",
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                is_tied=True,
            ),
        },
    ),
    "Roberta": _ROBERTA,
    "XLMRoberta": _ROBERTA,
    "Camembert": _ROBERTA,
    "Albert": EncoderFamily(
        _read_albert,
        _ALBERT_NAMES,
        "albert.",
        {
            **_PLAIN,
            SEQUENCE: HeadNames("classifier", ".pooler", pool="cls", activation="tanh"),
            MASKED: HeadNames("predictions", "predictions.dense", "predictions.LayerNorm", is_tied=True),
        },
    ),
    "DistilBert": EncoderFamily(
        _read_distilbert,
        _DISTILBERT_NAMES,
        "distilbert.",
        {
            **_PLAIN,
            SEQUENCE: HeadNames("classifier", "pre_classifier", pool="cls", activation="relu"),
            MASKED: HeadNames("vocab_projector", "vocab_transform", "vocab_layer_norm", is_tied=True),
        },
    ),
    "Electra": EncoderFamily(
        _read_electra,
        _ELECTRA_NAMES,
        "electra.",
        {
            **_PLAIN,
            SEQUENCE: HeadNames("classifier.out_proj", "classifier.dense", pool="cls", activation="gelu"),
            MASKED: HeadNames(
                "generator_lm_head",
                "generator_predictions.dense",
                "generator_predictions.LayerNorm",
                activation="gelu",
                is_tied=True,
            ),
        },
    ),
    "MPNet": EncoderFamily(_read_mpnet, _MPNET_NAMES, "mpnet.", _ROBERTA_HEADS),
    "ModernBert": EncoderFamily(
        _read_modernbert,
        _MODERNBERT_NAMES,
        "model.",
        {
            QUESTION: HeadNames("classifier", "head.dense", "head.norm"),
            TOKENS: HeadNames("classifier", "head.dense", "head.norm"),
            SEQUENCE: HeadNames("classifier", "head.dense", "head.norm", pool=None),
            MASKED: HeadNames("decoder", "head.dense", "head.norm", is_tied=True),
        },
    ),
}


def find_encoder(architecture: str) -> tuple[EncoderFamily, str] | None:
    """The family of a class name such as BertForQuestionAnswering, and its suffix; None if it has none."""
    for suffix in (*BARE, MASKED, QUESTION, SEQUENCE, TOKENS):
        family = ENCODERS.get(architecture.removesuffix(suffix))
        if family is not None and architecture.endswith(suffix) and (suffix in BARE or suffix in family.heads):
            return family, suffix
    return None
