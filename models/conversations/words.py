"""The words of the conversations, and which names and codes training never sees.

A fifth of all names and of all codes is held out by a hash of their spelling, so that every process
agrees on it without a list. Tests ask only for held-out ones, and there only for made-up names:
what the model answers it has read in the prompt.
"""

from hashlib import blake2b
from random import Random

_ONSETS = "b c d f g h j k l m n p r s t v w z br cr dr fl gr pl pr sl st tr".split()
_VOWELS = "a e i o u ai ea io ou".split()
_CODAS = "l m n r s t nd rn st x".split()
_ENDINGS = "a o en in is or us el an ik".split()

THINGS = (
    "acorn amber anchor apple arrow badge banjo barrel basin beacon bell bench birch bison "
    "blanket bottle bridge brush bucket butter button cabin cactus camel candle canoe canyon "
    "carpet carrot castle cedar cello chalk cherry chess circle clock cloud clover coffee comet "
    "compass copper coral cotton cradle crane crystal curtain daisy desk dolphin dragon drum "
    "eagle easel ember engine falcon feather fern ferry fiddle flag flask flint flute forest "
    "fossil fox garden garlic ginger glacier globe goose granite grape guitar hammer harbor "
    "harp hazel helmet heron honey igloo iris island ivory jacket jasmine jelly jungle kettle "
    "kite koala ladder lagoon lamp lantern lemon lily linen lizard lotus magnet mango maple "
    "marble meadow melon mirror mitten moon mosaic moss needle nest nutmeg oak oasis ocean "
    "olive onion opal orchid otter owl paddle palm panda paper parrot pearl pebble pepper piano "
    "pigeon pillow pine planet plum pocket pond poppy potato prism pumpkin quartz quilt rabbit "
    "radar raven ribbon river robin rocket rope ruby saddle saffron salmon sandal satin scarf "
    "shell silver sled spider spoon spruce squash statue sugar sunset swan table tango temple "
    "thistle tiger toast tomato topaz torch trumpet tulip tunnel turtle umbrella valley vase "
    "velvet violin walnut walrus wheat whistle willow window wolf yarn zebra zipper"
).split()

COLORS = "red blue green yellow white black brown pink gray orange purple silver".split()


def is_held_out(word: str) -> bool:
    """Whether training never sees this name or code."""
    return blake2b(word.encode(), digest_size=2).digest()[0] % 5 == 0


# What lists and tables are made of: a name that is held out appears nowhere in training.
LIST_WORDS = tuple(word for word in THINGS if not is_held_out(word))


def name(rng: Random, *, held_out: bool) -> str:
    """A name for a fact: a thing, or a made-up word of two or three syllables."""
    while True:
        is_thing = not held_out and rng.random() < 0.4
        found = rng.choice(THINGS) if is_thing else _made_up(rng)
        if is_held_out(found) == held_out:
            return found


def names(rng: Random, count: int, *, held_out: bool) -> list[str]:
    """Different names."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[name(rng, held_out=held_out)] = None
    return list(found)


def code(rng: Random, *, held_out: bool) -> str:
    """A code of four digits, the first not 0."""
    while True:
        found = str(rng.randint(1000, 9999))
        if is_held_out(found) == held_out:
            return found


def _made_up(rng: Random) -> str:
    syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS)]
    if rng.random() < 0.5:
        syllables.append(rng.choice(_ONSETS) + rng.choice(_VOWELS))
    tail = rng.choice(_CODAS) if rng.random() < 0.5 else rng.choice(_ENDINGS).lstrip("aeiou") or "n"
    return "".join(syllables) + tail
