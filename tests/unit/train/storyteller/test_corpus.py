"""Old books come out as plain modern text, and nothing held out is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.core.errors import ConfigError
from fastserve.train.storyteller.corpus import Document, clean_text, keep_easiest, read_corpus
from fastserve.train.storyteller.recipe import read_recipe


@pytest.mark.parametrize(
    ("printed", "plain"),
    [
        ("\u201cHush!\u201d said the\u00a0cat\u2026", '"Hush!" said the cat...'),
        ("'I like that,' said he. 'Don't you?'", '"I like that," said he. "Don\'t you?"'),
        ('"The boys\' hats," he said.', '"The boys\' hats," he said.'),
        ("CHAPTER IV\nA _very_ old man.[12] [Illustration: a man]", "A very old man."),
        ("Source.--Told in Kent.\nOnce there was a king .", "Once there was a king."),
        ("  two   spaces \n\n\n next", "two spaces\nnext"),
    ],
)
def test_clean_text(printed: str, plain: str) -> None:
    assert clean_text(printed) == plain


def test_held_out_stories_are_not_trained_on(recipe_path: Path, data_folder: Path) -> None:
    recipe = read_recipe(recipe_path)
    corpus = read_corpus(recipe.data, data_folder / "corpora", recipe.seed)
    trained = {document.text for documents in corpus.training.values() for document in documents}
    assert len(corpus.held_out["storybooks"]) == 2
    assert not trained & {document.text for documents in corpus.held_out.values() for document in documents}
    assert set(corpus.sha256) == {"stories.txt", "storybooks.jsonl", "held_out.txt"}


def test_split_depends_on_the_seed_only(recipe_path: Path, data_folder: Path) -> None:
    data = read_recipe(recipe_path).data
    first, again, other = (
        read_corpus(data, data_folder / "corpora", seed).held_out["storybooks"] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_blocked_words_leave_a_document_out(recipe_path: Path, data_folder: Path) -> None:
    path = data_folder / "corpora" / "stories.txt"
    path.write_text(path.read_text() + "\n<|endoftext|>\n" + "A badword stood here, and went on and on. " * 4)
    recipe_path.write_text(recipe_path.read_text().replace("[data]\n", '[data]\nblocked_words = ["badw"]\n'))
    recipe = read_recipe(recipe_path)
    corpus = read_corpus(recipe.data, data_folder / "corpora", recipe.seed)
    assert not any("badword" in document.text for document in corpus.training["stories"])


def test_keep_easiest_prefers_known_words_and_keeps_order() -> None:
    easy = Document("the cat sat on the mat. " * 40, "a")
    hard = Document("perspicacious ratiocination obfuscates the mat. " * 40, "a")
    words = {"the", "cat", "sat", "on", "mat"}
    assert keep_easiest([hard, easy], words, max_words=250) == [easy]
    assert keep_easiest([hard, easy], words, max_words=1000) == [hard, easy]


def test_missing_text_says_how_to_give_the_folder(recipe_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        read_corpus(read_recipe(recipe_path).data, tmp_path, seed=0)
