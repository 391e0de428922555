"""Every method on every kind of network: FastServe's own runtime, transformers and the plain weights say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from fastserve.checkpoint.folder import ModelFolder
from fastserve.cli.main import app
from fastserve.compress import calibration
from fastserve.compress.dense import expand
from fastserve.compress.network import load_dense
from fastserve.compress.recipe import make_recipe
from fastserve.compress.run import compress
from fastserve.core.errors import ConfigError
from fastserve.models.encoder import RaggedBatch
from fastserve.models.encoder_loader import load_encoder
from fastserve.models.loader import load_model
from tests.paged_driver import PagedDriver, decode_from_source
from tests.unit.compress.test_quantize import IDS, STEPS, logits

pytestmark = pytest.mark.slow  # every method on every family

Steps = list[dict[str, Any]]
_DISTIL = {"do": "distill", "steps": 2, "batch_size": 2, "length": 24, "soft": 0.5}
METHODS: dict[str, Steps] = {
    **{name: [{"do": "quantize", **step}] for name, step in STEPS.items()},
    "gptq-codebook": [{"do": "quantize", "method": "gptq", "kind": "codebook", "bits": 3}],
    "w8a8-asymmetric": [{"do": "quantize", "bits": 8, "symmetric": False, "activations": "dynamic"}],
    "w8a8-mse": [{"do": "quantize", "bits": 8, "activations": "static", "observer": "mse"}],
    "w8a8-entropy": [{"do": "quantize", "bits": 8, "activations": "static", "observer": "entropy"}],
    "float8-dynamic": [{"do": "quantize", "kind": "float", "bits": 8, "activations": "dynamic"}],
    "kv-cache": [{"do": "quantize", "bits": 8, "kv_cache": "float8"}],
    "mixed": [{"do": "quantize", "bits": 3, "group_size": 32, "budget": 5.0}],
    **{name: [{"do": "prune", "method": name}] for name in ("magnitude", "wanda", "sparsegpt", "operators")},
    "2:4": [{"do": "prune", "method": "sparsegpt", "pattern": "2:4"}],
    "bitmask": [{"do": "prune", "method": "magnitude", "store": "bitmask"}],
    **{name: [{"do": "prune", "method": name}] for name in ("channels", "heads", "kv-heads", "layers", "vocabulary")},
    "rank": [{"do": "prune", "method": "rank", "ratio": 0.4}],
    "rank-factors": [{"do": "prune", "method": "rank", "ratio": 0.4, "store": "factors"}],
    "rotate": [{"do": "rotate"}, {"do": "quantize", "group_size": 32}],
    "window": [{"do": "window", "size": 4}],
    "distill": [_DISTIL],
    "distill-lora": [{**_DISTIL, "lora_rank": 4}],
    "distill-hidden": [{**_DISTIL, "hidden": 1.0}],
    "distill-relations": [{**_DISTIL, "attention": 1.0}],
    "distill-rounded": [
        {**_DISTIL, "bits": 4, "group_size": 32},
        {"do": "quantize", "group_size": 32, "search": False},
    ],
    "distill-on-policy": [{**_DISTIL, "on_policy": 1.0}],
    "distill-layers": [{**_DISTIL, "layers": [1]}],
    "chain": [{"do": "prune", "method": "channels", "ratio": 0.25}, _DISTIL, {"do": "quantize", "group_size": 32}],
}
ALL, OTHERS = ("llama", "bert", "t5"), ("bert", "t5")
# What cannot be done, and what is said before work starts.
REFUSED = {
    "heads": (OTHERS, "like Llama's alone"),
    "kv-heads": (OTHERS, "like Llama's alone"),
    "kv-cache": (OTHERS, "kv_cache is for decoders"),
    "rotate": (OTHERS, "cannot be rotated"),
    "window": (OTHERS, "has no form with a window"),
    "distill-on-policy": (OTHERS, "on_policy is for decoders"),
    "layers": (("t5",), "not of networks that are both"),
    "distill-layers": (("t5",), "not of networks that are both"),
}
# What transformers 5.23 does not load as it is, but with its weights written out: zero points of packed weights,
# packed weights in T5 and in embeddings, codebooks, factors and left-out zeros.
ONLY_WRITTEN_OUT = {
    **dict.fromkeys(
        ("rtn4-asymmetric", "rtn2-asymmetric", "kmeans4", "kmeans3", "gptq-codebook", "bitmask", "rank-factors"), ALL
    ),
    **dict.fromkeys(("rtn4", "rtn6", "rtn3", "gptq", "awq", "mixed", "distill-rounded", "chain"), ("t5",)),
    "rtn4-head": OTHERS,  # and the built-in model, whose embedding is tied, too
}
CASES = [(name, kind) for name in METHODS for kind in ALL if kind not in REFUSED.get(name, ((), ""))[0]]
BUILTIN = [(name, "builtin") for name in METHODS]


def recipe(text: Path, name: str) -> Any:
    calibration = {"text": str(text), "samples": 4, "length": 32, "batch_size": 4}
    return make_recipe({"steps": METHODS[name], "calibration": calibration})


@torch.inference_mode()
def served(folder: ModelFolder, kind: str, kernels: str) -> Tensor:
    """Logits [T, V] of FastServe's own modules in float32."""
    if kind == "bert":
        encoder = load_encoder(folder, dtype="float32", kernels=kernels).model
        batch = RaggedBatch.of([IDS], [[0] * len(IDS)], encoder.device)
        return encoder.scores(encoder.forward(batch), batch)
    loaded = load_model(folder, dtype="float32", kernels=kernels)
    if kind == "t5":
        return decode_from_source(loaded, IDS, IDS)
    driver = PagedDriver(loaded)
    driver.add("a", IDS)
    return driver.step({"a": len(IDS)})["a"]


def in_transformers(folder: ModelFolder) -> Tensor:
    import transformers

    network = getattr(transformers, folder.architecture)
    return logits(network.from_pretrained(folder.path, dtype=torch.float32).eval(), folder)


def difference(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).abs().max() / reference.abs().max())


def rounded(folder: ModelFolder, by_transformers: bool) -> Tensor:
    """Logits with plain weights and with inputs of quantised linears rounded to 8 bits.

    FastServe takes each token's own range, whatever ranges the folder has, and keeps floats; transformers does as the
    folder says, and its integers have half a step more for a token's range.
    """
    model, entry = load_dense(folder), folder.config["quantization_config"]
    is_float = entry["format"] == "float-quantized"

    def hook(scale: Tensor | None) -> Any:
        def round_inputs(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            top = 448 if is_float else 127.5 if by_transformers else 127
            step = args[0].abs().amax(-1, keepdim=True).clamp(min=1e-12) / top if scale is None else scale
            values = args[0] / step
            values = values.to(torch.float8_e4m3fn).float() if is_float else values.round().clamp(-128, 127)
            return (values * step,)

        return round_inputs

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in entry["ignore"] and (by_transformers or not is_float):
            has_range = by_transformers and f"{name}.input_scale" in folder.weights
            scale = folder.weights.view(f"{name}.input_scale", (1,)).float() if has_range else None
            module.register_forward_pre_hook(hook(scale))
    return logits(model, folder)


@pytest.mark.parametrize(("name", "kind"), [*CASES, *BUILTIN])
def test_it_loads_everywhere(models: dict[str, Path], text: Path, tmp_path: Path, name: str, kind: str) -> None:
    source = ModelFolder.open("" if kind == "builtin" else str(models[kind]))
    folder = compress("" if kind == "builtin" else str(source.path), tmp_path / "out", recipe(text, name))
    dense = logits(load_dense(folder), folder)
    has_rounding = "activations" in METHODS[name][-1]
    tolerance = 1e-2 if has_rounding else 1e-5
    for kernels in ("reference", "auto"):
        reference = rounded(folder, by_transformers=False) if has_rounding else dense
        assert difference(served(folder, kind, kernels), reference) < tolerance
    is_tied_head = kind == "builtin" and name == "rtn4-head"
    kinds = ONLY_WRITTEN_OUT.get(name, ())
    if not (kind in kinds or is_tied_head or (kind == "builtin" and "llama" in kinds) or name == "kv-cache"):
        reference = rounded(folder, by_transformers=True) if has_rounding else dense
        assert difference(in_transformers(folder), reference) < tolerance
    if "quantization_config" in folder.config:
        assert folder.weight_bytes < source.weight_bytes
        plain = expand(folder, tmp_path / "plain")
        assert "quantization_config" not in plain.config
        tolerance = 5e-2 if plain.config["dtype"] == "bfloat16" else 1e-5
        assert difference(in_transformers(plain), dense) < tolerance
        assert difference(served(plain, kind, "reference"), dense) < tolerance


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (kinds, _) in REFUSED.items() for kind in kinds])
def test_what_does_not_apply_is_refused_before_work(
    models: dict[str, Path], text: Path, tmp_path: Path, name: str, kind: str
) -> None:
    with pytest.raises(ConfigError, match=REFUSED[name][1]):
        compress(str(models[kind]), tmp_path / "out", recipe(text, name))
    assert not list(tmp_path.iterdir())


def test_scales_of_keys_and_values(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """The calibration's largest magnitudes over that of e4m3; transformers rounds its cache by them."""
    wanted = recipe(text, "kv-cache")
    folder = compress(str(models["llama"]), tmp_path / "out", wanted)
    model = load_dense(folder)
    windows = calibration.windows(folder, wanted.calibration)
    with torch.no_grad():
        cached = model(windows, use_cache=True).past_key_values
    for layer, entry in enumerate(cached.layers):
        for name, values in (("k_scale", entry.keys), ("v_scale", entry.values)):
            scale = folder.weights.view(f"model.layers.{layer}.self_attn.{name}", (1,))
            assert float(scale) == pytest.approx(float(values.abs().max()) / 448, rel=1e-4)
    dense, theirs = logits(model, folder), in_transformers(folder)
    assert 1e-4 < difference(theirs, dense) < 0.2
    assert torch.nn.functional.cosine_similarity(theirs, dense).min() > 0.95


def test_the_command_that_writes_weights_out(models: dict[str, Path], tmp_path: Path) -> None:
    folder = compress(str(models["llama"]), tmp_path / "in", make_recipe({"steps": METHODS["kmeans4"]}))
    arguments = ["compress", str(folder.path), "--dense", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    plain = ModelFolder.open(str(tmp_path / "out"))
    assert json.loads(result.stdout) == {"folder": str(plain.path), "bytes": plain.weight_bytes}
    assert sorted(plain.weights.names()) == sorted(ModelFolder.open(str(models["llama"])).weights.names())
    with pytest.raises(ConfigError, match="holds no compressed weights"):
        expand(plain, tmp_path / "again")
    assert not list(tmp_path.glob("again*"))
