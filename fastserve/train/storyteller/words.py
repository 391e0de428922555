"""Word lists for finding and swapping the subjects of stories. Data only; `topics.py` uses them."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KINDS: dict[str, tuple[str, ...]] = {
    "animal": _words(
        """
        ant bear beaver bee beetle bird buffalo bull butterfly camel cat chicken cow crab cricket crocodile
        crow deer dog donkey dove duck eagle elephant fish fox frog giraffe goat goose grasshopper hare hen
        hippo horse hyena jackal kitten lamb leopard lion lizard mole monkey mosquito mouse ostrich ox parrot
        peacock pig pigeon pony puppy rabbit rat raven robin rooster sheep snail snake sparrow spider squirrel
        stork swan tiger tortoise turkey turtle whale wolf woodpecker worm zebra
        """
    ),
    "man": _words(
        """
        baker blacksmith boy carpenter cook farmer fisherman gardener giant hunter king merchant miller
        painter potter prince sailor shepherd shoemaker soldier tailor thief wizard woodcutter
        """
    ),
    "woman": _words("bride fairy girl grandmother mermaid princess queen witch woman"),
    "thing": _words(
        """
        apple axe bag ball balloon banana basket bed bell bench bicycle blanket boat book bottle bowl box
        bracelet broom bucket button cake candle cap carpet chair chest clock coat coin comb cup cushion desk
        doll door drum egg fan feather flag flower flute fork guitar hammer hat hook jar jug kettle kite knife
        ladder lamp leaf mango map mat mirror needle net nut orange oven paintbrush parcel pear pebble pen
        pencil pipe plate plum pot potato pumpkin purse ring rope sack saddle sandwich scarf seed shell shirt
        shoe shovel slipper spoon stick stone stool suitcase sweater table telephone tent ticket tomato torch
        towel toy train tree turnip umbrella vase wagon wheel whistle
        """
    ),
}
KNOWN_NOUNS = frozenset(noun for nouns in KINDS.values() for noun in nouns)

NAMES: dict[str, tuple[str, ...]] = {
    "boy": _words(
        """
        Abdu Adam Ali Arjun Ben Bobby Carl Daniel David Edward Felix George Harry Hassan Ivan Jack Jacob James
        Jim John Juma Kofi Leo Luke Mark Max Michael Nico Oliver Omar Oscar Paul Peter Ravi Robert Sam Simon
        Temba Thomas Tim Tom Victor
        """
    ),
    "girl": _words(
        """
        Alice Amina Anna Asha Bella Clara Daisy Dina Ella Emily Emma Fatima Grace Helen Ida Jane Julia Kate
        Laila Lily Lina Lucy Maria Mary Maya Meena Mia Nancy Nina Nora Olivia Priya Rosa Rosie Ruth Sara Sofia
        Susan Tara Wanja Zara Zoe
        """
    ),
}

IRREGULAR_PLURALS = {
    "child": "children",
    "deer": "deer",
    "fish": "fish",
    "fisherman": "fishermen",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "man": "men",
    "mouse": "mice",
    "ox": "oxen",
    "sheep": "sheep",
    "thief": "thieves",
    "wife": "wives",
    "wolf": "wolves",
    "woman": "women",
}

# Countable nouns that no story is about.
NO_SUBJECT = frozenset(
    _words(
        """
        bit chance day days deal dozen end evening eye face fact few foot good great hand head hole hour
        hundred hurry idea kind least little long look lot man manner matter mile minute mistake moment month
        morning name night noise number one other others pair part piece place reason second share side sort
        story thing thousand time trouble voice walk way week west while word work year
        """
    )
)
