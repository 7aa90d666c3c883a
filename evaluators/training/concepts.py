"""Concepts of a text, its key phrases, and which of them stand together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import combinations, groupby

STOPWORDS = frozenset(
    """
    a about above after again against all also am an and any are as at be because been before being below
    between both but by can could did do does doing down during each few for from further had has have
    having he her here hers him his how i if in into is it its itself just may me might more most must my no
    nor not now of off on once one only or other our out over own same shall she should so some such than
    that the their them then there these they this those through to too two under until up upon very was we
    were what when where which while who whom why will with would you your
    """.split()  # noqa: SIM905  # a word a line is no easier to read
)
N_CONCEPTS = 5
"""Phrases of the highest scores that stand for a text."""

_PIECE = re.compile(r"[A-Za-z][A-Za-z'-]*|[^\sA-Za-z]+")


def concepts_of(text: str, n: int = N_CONCEPTS) -> frozenset[str]:
    """The key phrases of a text by RAKE (Rose et al. 2010, Automatic Keyword Extraction).

    Phrases are runs of words between stop words, numbers and punctuation. A word's score is the number of words of all
    phrases that it stands in over its frequency, and a phrase's the sum of its words'. Of equal ones the first by
    alphabet count.
    """
    pieces = [piece.lower() for piece in _PIECE.findall(text)]
    runs = groupby(pieces, key=lambda piece: piece[0].isalpha() and piece not in STOPWORDS)
    phrases = [tuple(words) for inside, words in runs if inside]
    frequency, degree = Counter[str](), Counter[str]()
    for phrase in phrases:
        for word in phrase:
            frequency[word] += 1
            degree[word] += len(phrase)
    scores = {phrase: sum(degree[word] / frequency[word] for word in phrase) for phrase in phrases}
    best = sorted(scores, key=lambda phrase: (-scores[phrase], phrase))[:n]
    return frozenset(" ".join(phrase) for phrase in best)


class ConceptGraph:
    """Concepts of the chosen samples, linked where one sample has both (PASER's concept consistency graph)."""

    def __init__(self) -> None:
        self._linked: dict[str, set[str]] = {}

    def conflicts(self, concepts: Iterable[str]) -> bool:
        """True if two of the concepts are known, and stand together in no chosen sample."""
        known = [x for x in concepts if x in self._linked]
        return any(other not in self._linked[one] for one, other in combinations(known, 2))

    def add(self, concepts: Iterable[str]) -> None:
        """Link the concepts of a chosen sample."""
        every = set(concepts)
        for concept in every:
            self._linked.setdefault(concept, set()).update(every - {concept})
