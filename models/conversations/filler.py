"""Text that says nothing: sentences between the facts, with numbers of their own."""

from random import Random

from baton.models.conversations import words

_WHO = (
    "The clerk|A neighbour|The captain|My sister|The gardener|An old friend|The teacher|A visitor|"
    "The driver|The baker|A student|The keeper|The mayor|Our guide|The painter|A sailor"
).split("|")
_DID = (
    "walked to|waited near|looked at|wrote about|spoke of|came back from|painted|measured|visited|"
    "asked about|drew a map of|dreamed of|slept beside|left|passed|remembered"
).split("|")
_WHERE = (
    "the old mill|the north gate|the market|the long bridge|the quiet street|the station|the hill|"
    "the empty hall|the small harbour|the library|the orchard|the second floor|the train yard|"
    "the blue house|the river bank|the workshop"
).split("|")
_WHEN = (
    "in the morning|before noon|late at night|after the rain|on Monday|last week|in early spring|"
    "without a word|once again|for a while|as usual|with great care"
).split("|")
_UNITS = "steps|boxes|minutes|pages|coins|chairs|miles|tickets|letters|apples".split("|")


def sentence(rng: Random) -> str:
    """One sentence; every third or so holds a number, at times one that looks like a code."""
    start = f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHERE)}"
    kind = rng.random()
    if kind < 0.6:
        return f"{start} {rng.choice(_WHEN)}."
    count = int(words.code(rng, held_out=False)) if kind < 0.8 else rng.randint(2, 99)
    if kind < 0.9:
        return f"{start} and counted {count} {rng.choice(_UNITS)}."
    return f"{start} {rng.choice(_WHEN)}; it took {count} {rng.choice(_UNITS)}."
