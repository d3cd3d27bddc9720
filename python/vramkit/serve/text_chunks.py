"""Long text in pieces that a speech model takes at once, cut where a reader would pause."""

from __future__ import annotations

import re

# Where to cut, best first: after sentences, clauses, words. The cut is at the match's end.
_CUTS = (
    re.compile(r"[.!?\u2026]+[\"')\]\u201d\u2019]*\s+|\n+|[\u3002\uff01\uff1f]"),
    re.compile(r"[,;:\u2014]\s+|[\u3001\uff0c\uff1b]"),
    re.compile(r"\s+"),
)


def split_text(text: str, limit: int) -> list[str]:
    """`text` in order, in pieces of at most `limit` characters, none empty.

    Pieces end with a sentence where one ends in time, else with a clause or a word; a word longer
    than the limit is cut. Short sentences share a piece. Nothing but white space is lost.

    >>> split_text("One. Two is longer. Three!", 20)
    ['One. Two is longer.', 'Three!']
    """
    if limit < 1:
        raise ValueError(f"the limit must be at least 1 character, not {limit}")
    pieces = []
    rest = text.strip()
    while rest:
        end = len(rest) if len(rest) <= limit else _cut(rest, limit)
        piece = rest[:end].strip()
        if piece:
            pieces.append(piece)
        rest = rest[end:].lstrip()
    return pieces


def _cut(text: str, limit: int) -> int:
    # One more character, so that white space may stand just behind the limit.
    window = text[: limit + 1]
    for pattern in _CUTS:
        last = 0
        for match in pattern.finditer(window):
            if len(window[: match.end()].rstrip()) <= limit:
                last = match.end()
        if last:
            return last
    return limit
