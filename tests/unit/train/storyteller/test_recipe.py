"""A recipe that cannot work is refused with the name of the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastserve.core.errors import ConfigError
from fastserve.train.storyteller.recipe import read_recipe
from tests.conftest import REPOSITORY

BUILTIN = REPOSITORY / "configs" / "builtin_texts.toml"


def test_built_in_recipe_reads() -> None:
    recipe = read_recipe(BUILTIN)
    assert recipe.data.sources["storybooks"].kind == "storybooks"
    assert recipe.as_dict()["chats"]["requests_per_story"]["stories"] > 0


def test_whole_numbers_are_read_as_shares(recipe_path: Path) -> None:
    recipe_path.write_text(recipe_path.read_text().replace("book_share = 0.2", "book_share = 0"), encoding="utf-8")
    share = read_recipe(recipe_path).chats.book_share
    assert share == 0 and type(share) is float


def test_pretraining_of_the_built_in_model_reads() -> None:
    """The recipe names what the script makes, and the shape of the model that ships."""
    import json

    from fastserve.train.settings import read_recipe as read_training_recipe

    recipe = read_training_recipe(REPOSITORY / "configs" / "builtin.toml")
    script = (REPOSITORY / "examples" / "builtin_model.sh").read_text(encoding="utf-8")
    folder = re.search(r"^out=(\S+)", script, re.MULTILINE)
    assert folder and all(path.startswith(f"{folder[1]}/data/") for path in recipe.data.sources.values())
    shipped = json.loads((REPOSITORY / "fastserve" / "checkpoint" / "builtin" / "config.json").read_text())
    assert all(shipped[name] == value for name, value in recipe.model.config.items())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 7", "", "key 'seed' is missing"),
        ("seed = 7", "sead = 7", "unknown key 'sead'"),
        ("seed = 7", 'seed = "7"', "recipe key seed: expected int"),
        ("plots = 0", "plots = 0.5", "recipe key chats.plots: expected int"),
        ("book_share = 0.2", "book_share = 1.0", "chats.book_share must be"),
        ('book_sources = ["stories"]', 'book_sources = ["poems"]', "chats.book_sources names 'poems'"),
        ('book_sources = ["stories"]', "", "book_share needs chats.book_sources"),
        ("stories = 1 }", "poems = 1 }", "chats.requests_per_story names 'poems'"),
        ("[chats]\n", "[chats\n", "not valid TOML"),
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
