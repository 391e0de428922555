"""Native encoders against transformers on random folders: every family and head, within 1e-4 in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.errors import CheckpointError
from fastserve.models.encoder import RaggedBatch
from fastserve.models.encoder_loader import load_encoder
from tests import encoder_folders
from tests.encoder_folders import FAMILIES, HEADS, VOCAB_SIZE

LENGTHS = [37, 5, 1, 60, 128]
CASES = [(family, head, {}) for family in FAMILIES for head in HEADS]
CASES += [
    (
        "ModernBert",
        "ForSequenceClassification",
        {"classifier_pooling": "mean", "attention_bias": True, "mlp_bias": True},
    ),
    ("ModernBert", "ForTokenClassification", {"norm_bias": True, "classifier_bias": True}),
    ("Albert", "ForMaskedLM", {"num_hidden_groups": 1}),
    ("Electra", "Model", {"embedding_size": 64}),
    ("Bert", "ForSequenceClassification", {"num_labels": 1}),
]


def sequences(types: int) -> tuple[list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]
    return ids, [[int(place > length // 2) % types for place in range(length)] for length in LENGTHS]


def expected(reference: Any, ids: list[int], types: list[int]) -> Tensor:
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    if getattr(reference.config, "type_vocab_size", 0) and hasattr(
        reference.base_model.embeddings, "token_type_embeddings"
    ):
        inputs["token_type_ids"] = torch.tensor([types])
    output = reference(**inputs)
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state)[0]


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize(
    ("family", "head", "options"), CASES, ids=["-".join([case[0], case[1], *case[2]]) for case in CASES]
)
@torch.inference_mode()
def test_scores_equal_transformers(
    family: str, head: str, options: dict[str, Any], kernels: str, tmp_path: Path
) -> None:
    import transformers

    folder = encoder_folders.encoder(tmp_path, family, head, **options)
    reference = getattr(transformers, family + head).from_pretrained(folder, attn_implementation="eager").eval()
    model = load_encoder(ModelFolder.open(str(folder)), kernels=kernels).model
    ids, types = sequences(max(1, model.config.num_types))
    batch = RaggedBatch.of(ids, types, model.device)
    hidden = model.forward(batch)
    actual = hidden if head == "Model" else model.scores(hidden, batch)
    wanted = [expected(reference, *pair) for pair in zip(ids, types, strict=True)]
    together = torch.stack(wanted) if head == "ForSequenceClassification" else torch.cat(wanted)
    assert actual.shape == together.shape and actual.dtype is torch.float32
    assert together.std() > 0.1  # not degenerate
    torch.testing.assert_close(actual, together, atol=1e-4, rtol=0)


def test_norms_may_have_their_old_names(tmp_path: Path) -> None:
    """Folders made of TensorFlow checkpoints, such as bert-base-uncased, say gamma and beta."""
    from safetensors.torch import load_file, save_file

    folder = encoder_folders.encoder(tmp_path, "Bert")
    before = load_encoder(ModelFolder.open(str(folder)), kernels="reference").model
    tensors = load_file(folder / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        for new_name, old_name in old.items():
            name = name.replace(new_name, old_name)
        renamed[name] = tensor
    assert set(renamed) != set(tensors)
    save_file(renamed, folder / "model.safetensors")
    after = load_encoder(ModelFolder.open(str(folder)), kernels="reference").model
    batch = RaggedBatch.of([[5, 6, 7]], [[]], after.device)
    assert torch.equal(before.forward(batch), after.forward(batch))


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_in_int8_give_nearly_the_same(dtype: str, kernels: str, tmp_path: Path) -> None:
    folder = ModelFolder.open(str(encoder_folders.encoder(tmp_path, "Bert", "ForTokenClassification")))
    exact = load_encoder(folder, kernels="reference").model
    loaded = load_encoder(folder, dtype=dtype, kernels=kernels, quantization="int8")
    batch = RaggedBatch.of(*sequences(2), loaded.model.device)
    ours, theirs = loaded.model.forward(batch).float(), exact.forward(batch)
    cosines = torch.nn.functional.cosine_similarity(ours, theirs)
    assert 0.99 < cosines.min() < 0.99999  # near, and really another computation
    assert "layers: int8" in loaded.report
    if loaded.kernels.name == "cpu":  # the reference keeps floats
        held = load_encoder(folder, dtype=dtype, kernels=kernels).model.shape.weight_bytes
        assert loaded.model.shape.weight_bytes < held


def test_what_is_no_encoder_is_refused_by_name(tmp_path: Path) -> None:
    folder = encoder_folders.encoder(tmp_path, "Bert")
    file = folder / "config.json"
    file.write_text(file.read_text().replace("BertModel", "FunnelModel"))
    with pytest.raises(CheckpointError, match=r"FunnelModel.*families: Bert, Roberta"):
        load_encoder(ModelFolder.open(str(folder)))
