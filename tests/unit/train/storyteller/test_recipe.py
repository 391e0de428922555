"""A recipe that cannot work is refused with the name of the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.core.errors import ConfigError
from fastserve.train.storyteller.recipe import read_recipe
from tests.conftest import REPOSITORY

BUILTIN = REPOSITORY / "configs" / "builtin.toml"


def test_built_in_recipe_reads() -> None:
    recipe = read_recipe(BUILTIN)
    assert recipe.model.hidden_size // recipe.model.num_attention_heads == 64
    assert recipe.data.sources["storybooks"].kind == "storybooks"
    assert recipe.as_dict()["pretrain"]["phases"][0]["mixture"]["stories"] > 0


def test_whole_numbers_are_read_as_shares(recipe_path: Path) -> None:
    mixture = read_recipe(recipe_path).pretrain.phases[0].mixture
    assert mixture == {"storybooks": 1.0, "stories": 1.0}
    assert all(type(share) is float for share in mixture.values())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 7", "", "key 'seed' is missing"),
        ("seed = 7", "sead = 7", "unknown key 'sead'"),
        ("seed = 7", 'seed = "7"', "recipe key seed: expected int"),
        ("vocab_size = 320", "vocab_size = 320.5", "recipe key tokenizer.vocab_size: expected int"),
        ("hidden_size = 32", "hidden_size = 33", "multiple of model.num_attention_heads"),
        ("length = 64", "length = 60", "phases[0].length"),
        ("length = 256", "length = 512", "exceed model.max_position_embeddings"),
        ("mixture = { stories = 1.0 }", "mixture = { poems = 1.0 }", "phases[1] mixes 'poems'"),
        ("[tune]\n", "[tune\n", "not valid TOML"),
    ],
)
def test_errors_name_the_key(recipe_path: Path, old: str, new: str, message: str) -> None:
    text = recipe_path.read_text(encoding="utf-8")
    assert old in text
    recipe_path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_recipe(recipe_path)
    assert message in str(error.value)


def test_missing_file_says_which_one_to_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"see configs/"):
        read_recipe(tmp_path / "none.toml")
