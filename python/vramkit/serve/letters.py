"""English text to phonemes: numbers and signs to words, words by exceptions and letter rules.

Phonemes have ARPAbet's names. The rules are tried in order at each place of a word; they are few,
so that unusual words are spoken as they are spelled. The formant synthesizer uses this, nothing
else does.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

VOWELS = frozenset(
    ("IY", "IH", "EH", "AE", "AA", "AO", "UH", "UW", "AH", "ER", "AX", "EY", "AY", "OY", "AW", "OW")
)


class Word(NamedTuple):
    """A spoken word, or a pause where `phonemes` is empty; `mark` is the punctuation behind it."""

    phonemes: tuple[str, ...]
    mark: str


def _parts(text: str, separator: str | None = None) -> list[str]:
    return [part.strip() for part in text.split(separator)]


# Common words that the rules would get wrong, and what they sound like.
_EXCEPTIONS = {
    entry.partition(":")[0]: tuple(entry.partition(":")[2].split())
    for entry in _parts(
        """
    a:AX; the:DH AX; of:AX V; to:T UW; do:D UW; two:T UW; who:HH UW; you:Y UW; your:Y AO R;
    one:W AH N; once:W AH N S; was:W AA Z; were:W ER; are:AA R; is:IH Z; his:HH IH Z; as:AE Z;
    has:HH AE Z; have:HH AE V; be:B IY; he:HH IY; she:SH IY; me:M IY; we:W IY; they:DH EY;
    their:DH EH R; there:DH EH R; this:DH IH S; that:DH AE T; these:DH IY Z; those:DH OW Z;
    them:DH EH M; then:DH EH N; than:DH AE N; with:W IH DH; what:W AH T; where:W EH R;
    from:F R AH M; some:S AH M; come:K AH M; done:D AH N; none:N AH N; does:D AH Z; said:S EH D;
    says:S EH Z; again:AX G EH N; any:EH N IY; many:M EH N IY; people:P IY P AX L; give:G IH V;
    get:G EH T; girl:G ER L; gift:G IH F T; begin:B IH G IH N; live:L IH V; love:L AH V;
    other:AH DH ER; mother:M AH DH ER; brother:B R AH DH ER; word:W ER D; work:W ER K;
    world:W ER L D; worse:W ER S; hello:HH AX L OW; eye:AY; by:B AY; my:M AY; why:W AY;
    fly:F L AY; sky:S K AY; try:T R AY; dry:D R AY; cry:K R AY; bed:B EH D; red:R EH D;
    led:L EH D; fed:F EH D; put:P UH T; push:P UH SH; sure:SH UH R; laugh:L AE F;
    enough:IH N AH F; through:TH R UW; though:DH OW; good:G UH D; foot:F UH T; blood:B L AH D;
    head:HH EH D; great:G R EY T; heart:HH AA R T; quality:K W AA L AX T IY; water:W AO T ER;
    memory:M EH M ER IY; model:M AA D AX L; very:V EH R IY; only:OW N L IY; over:OW V ER;
    open:OW P AX N; no:N OW; so:S OW; go:G OW; both:B OW TH; most:M OW S T; into:IH N T UW;
    i:AY; im:AY M; dont:D OW N T; wont:W OW N T; its:IH T S; ive:AY V; youre:Y AO R;
    cant:K AE N T; arent:AA R AX N T; isnt:IH Z AX N T; four:F AO R; eight:EY T;
    seven:S EH V AX N; eleven:IH L EH V AX N; zero:Z IH R OW; hour:AW ER; our:AW ER;
    speech:S P IY CH; audio:AO D IY OW; video:V IH D IY OW; idea:AY D IY AX; city:S IH T IY;
    because:B IH K AO Z; before:B IH F AO R; about:AX B AW T; every:EH V R IY;
    friend:F R EH N D; busy:B IH Z IY; minute:M IH N IH T; woman:W UH M AX N; women:W IH M IH N;
    young:Y AH NG; country:K AH N T R IY; could:K UH D; would:W UH D; should:SH UH D;
    hundred:HH AH N D R AX D; percent:P ER S EH N T; text:T EH K S T
    """,
        ";",
    )
}

_LETTER_NAMES = dict(
    zip(
        "abcdefghijklmnopqrstuvwxyz",
        _parts(
            "EY;B IY;S IY;D IY;IY;EH F;JH IY;EY CH;AY;JH EY;K EY;EH L;EH M;EH N;OW;P IY;K Y UW;"
            "AA R;EH S;T IY;Y UW;V IY;D AH B AX L Y UW;EH K S;W AY;Z IY",
            ";",
        ),
        strict=True,
    )
)

# Regular expression at the place where one is in the word, and the phonemes it gives (or none).
# A long vowel stands before one consonant and a silent e, or an ending that has swallowed the e.
_LONG = r"(?=[bcdfgklmnpstvz](?:e[ds]?|ing)\b)"
_RULES = tuple(
    (re.compile(pattern), tuple(sounds.split()))
    for pattern, sounds in (
        ("ation", "EY SH AX N"), (r"(?<=[a-z]{2})able\b", "AX B AX L"), (r"a(?=ble\b)", "EY"),
        ("augh(?=t)|au|aw", "AO"), ("air", "EH R"), ("ai|ay", "EY"), (r"are\b", "EH R"),
        ("arr", "AE R"), ("ar(?=[aeiou])", "EH R"), ("(?<=w)ar", "AO R"), ("ar", "AA R"),
        ("all", "AO L"), ("al(?=[kt])", "AO"), ("a" + _LONG, "EY"), ("(?<=w)a(?=[tsn])", "AA"),
        (r"a\b", "AX"), (r"\ba(?=[bcdgl]+[aou])", "AX"), ("a", "AE"), (r"(?<=m)b\b", ""),
        (r"b(?=t\b)", ""), ("bb?", "B"), ("ch(?=r)", "K"), ("ch", "CH"), ("ck", "K"),
        ("ci(?=[aou])", "SH"), ("cc(?=[ei])", "K S"), ("c(?=[eiy])", "S"), ("cc?", "K"),
        ("dge?", "JH"), ("dd?", "D"), (r"(?<=[td])ed\b", "IH D"), (r"(?<=[pkfsxh])ed\b", "T"),
        (r"(?<=[bgjlmnrvwzy])ed\b", "D"), (r"(?<=[szx])es\b", "IH Z"), (r"(?<=[cs]h)es\b", "IH Z"),
        (r"(?<=[cg])es\b", "IH Z"), (r"(?<=[^aeiou])es\b", "Z"), ("eau", "OW"),
        ("ear(?=[nlt])", "ER"), ("eer|ear", "IH R"), (r"ea(?=d\b|th\b|lth)", "EH"),
        ("ea|ee", "IY"), ("eigh", "EY"), ("ei", "IY"), (r"ey\b", "IY"), ("(?<=[rlj])e[uw]", "UW"),
        ("e[uw]", "Y UW"), ("er(?=[aeiou])", "EH R"), ("er", "ER"),
        (r"e(?=[bcdfgklmnpstvz]e\b)", "IY"), (r"e(?=(?:ly|ment|ness|ful|less)\b)", ""),
        (r"(?<=.)e\b", ""), ("e", "EH"), ("ff?", "F"), (r"\bgn|gn\b", "N"), (r"\bgh", "G"),
        ("gh", ""), ("gg", "G"), ("gu(?=[aei])", "G"), (r"ge\b", "JH"), ("g(?=[eiy])", "JH"),
        ("g", "G"), (r"(?<=[aeiou])h(?![aeiou])", ""), ("h", "HH"), ("igh", "AY"),
        (r"i(?=(?:nd|ld)\b)", "AY"), (r"ire\b", "AY ER"), (r"ies\b", "IY Z"), (r"ied\b", "IY D"),
        ("ier", "IY ER"), ("ie", "IY"), ("ir", "ER"), ("i" + _LONG, "AY"), ("i(?=[aou])", "IY"),
        (r"i\b", "IY"), ("i", "IH"), ("j", "JH"), (r"\bkn", "N"), ("kk?", "K"),
        (r"(?<=[^aeiou])le\b", "AX L"), ("(?<=a)l(?=[fkm])", ""), ("ll?", "L"), ("mm?", "M"),
        (r"n(?=[kx])", "NG"), ("ng(?=[aou]|l)", "NG G"), ("ng", "NG"), ("nn?", "N"),
        ("ought", "AO T"), ("ough", "OW"), ("oo(?=k)", "UH"), ("oo", "UW"), (r"ous\b", "AX S"),
        ("ould", "UH D"), ("our", "AO R"), ("ou", "AW"), (r"ow\b", "OW"), ("ow", "AW"),
        ("oi|oy", "OY"), (r"oa|oe\b", "OW"), (r"ore?", "AO R"), (r"o(?=ld|st\b|ll\b)", "OW"),
        ("o" + _LONG, "OW"), (r"o\b", "OW"), (r"(?<=[a-z])on\b", "AX N"), ("o", "AA"), ("ph", "F"),
        (r"\bps", "S"), ("pp?", "P"), (r"que\b", "K"), ("qu", "K W"), ("q", "K"), ("rh|rr?", "R"),
        ("sch", "S K"), ("sh", "SH"), ("(?<=[aeiou])sion", "ZH AX N"), ("s?sion", "SH AX N"),
        (r"(?<=[aeiou])sure\b", "ZH ER"), ("sc(?=[eiy])", "S"), ("ss", "S"),
        ("(?<=[aeiou])s(?=[aeiou])", "Z"), (r"(?<=[bdgvmnlrwyeao])s\b", "Z"), ("s", "S"),
        ("tch", "CH"), ("tion", "SH AX N"), ("ti(?=[ao])", "SH"), (r"ture\b", "CH ER"),
        ("(?<=[aeiou])th(?=e)", "DH"), ("th", "TH"), ("tt?", "T"), (r"\buni", "Y UW N IH"),
        ("(?<=[rljs])u" + _LONG, "UW"), ("u" + _LONG, "Y UW"), ("ur", "ER"), (r"ui|ue\b", "UW"),
        ("uy", "AY"), (r"ull\b", "UH L"), (r"u\b", "UW"), ("u(?=[lt][aeiou])", "Y UW"),
        ("u", "AH"), ("vv?", "V"), (r"\bwr", "R"), (r"\bwh(?=o)", "HH"), ("wh", "W"),
        (r"w(?![aeiouy])", ""), ("w", "W"), (r"\bx", "Z"), ("x", "K S"),
        (r"\by|y(?=[aeiou])", "Y"), (r"y(?=[^aeiou]e\b)", "AY"), (r"y\b", "IY"), ("y", "IH"),
        ("zz?", "Z"),
    )
)  # fmt: skip

_SIGNS = {
    "%": "percent", "&": "and", "@": "at", "+": "plus", "=": "equals", "#": "number",
    "$": "dollars", "\u00a3": "pounds", "\u20ac": "euros",
}  # fmt: skip
_ONES = _parts(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = _parts("twenty thirty forty fifty sixty seventy eighty ninety")
_POWERS = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
_LARGEST = 10**12  # from here on digit by digit

_TOKEN = re.compile(
    r"(?P<number>\d+(?:\.\d+)?)|(?P<word>[A-Za-z]+(?:'[A-Za-z]+)*)|(?P<sign>[%&@+=#$\u00a3\u20ac])"
    r"|(?P<mark>[.!?,;:\u2026\u2014()\n-]+)"
)


def number_words(n: int) -> list[str]:
    """A whole number in words; 10^12 and more digit by digit.

    >>> number_words(1204)
    ['one', 'thousand', 'two', 'hundred', 'four']
    """
    if n >= _LARGEST:
        return [_ONES[int(digit)] for digit in str(n)]
    if n < 20:
        return [_ONES[n]]
    if n < 100:
        return [_TENS[n // 10 - 2], *(number_words(n % 10) if n % 10 else ())]
    size, name = next(power for power in _POWERS if n >= power[0])
    return [*number_words(n // size), name, *(number_words(n % size) if n % size else ())]


def phonemes_of(word: str) -> tuple[str, ...]:
    """The phonemes of one word in lower-case letters.

    >>> " ".join(phonemes_of("station"))
    'S T EY SH AX N'
    """
    if word in _EXCEPTIONS:
        return _EXCEPTIONS[word]
    found: list[str] = []
    place = 0
    while place < len(word):
        for pattern, sounds in _RULES:
            match = pattern.match(word, place)
            if match is not None and match.end() > place:
                found += sounds
                place = match.end()
                break
        else:  # every letter has a rule of its own, except what silent rules leave
            place += 1
    return tuple(found)


def _spelled(word: str) -> tuple[str, ...]:
    return tuple(sound for letter in word.lower() for sound in _LETTER_NAMES[letter].split())


def words_of(text: str) -> Iterator[Word]:
    """What is spoken of a text, in order. Letters with accents lose them; other scripts are silent.

    >>> [" ".join(w.phonemes) + w.mark for w in words_of("Hi, GPU!")]
    ['HH IY,', 'JH IY P IY Y UW!']
    """
    plain = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    pending: Word | None = None
    for token in _TOKEN.finditer(plain):
        if token["mark"] is not None:
            mark = _mark(token["mark"])
            if pending is not None and mark:
                yield Word(pending.phonemes, mark)
                pending = None
            continue
        for phonemes in _sounds(token):
            if pending is not None:
                yield pending
            pending = Word(phonemes, "")
    if pending is not None:
        yield pending


def _mark(text: str) -> str:
    for mark in "?!.":
        if mark in text:
            return mark
    return "." if "\u2026" in text or "\n" in text else ("" if text == "-" else ",")


def _sounds(token: re.Match[str]) -> Iterator[tuple[str, ...]]:
    if token["number"] is not None:
        whole, _, part = token["number"].partition(".")
        words = _number(whole)
        if part:
            words += ["point", *(_ONES[int(digit)] for digit in part)]
        yield from map(phonemes_of, words)
    elif token["sign"] is not None:
        yield phonemes_of(_SIGNS[token["sign"]])
    else:
        word = token["word"].replace("'", "")
        sounds = phonemes_of(word.lower())
        # Capitals and words with no vowel are spelled: GPU, GPUs, TTS, mp.
        name = word.removesuffix("s")
        if name.isupper() and 2 <= len(name) <= 4:
            yield (*_spelled(name), *(("Z",) if name != word else ()))
        else:
            yield sounds if VOWELS.intersection(sounds) else _spelled(word)


def _number(digits: str) -> list[str]:
    """Words of a run of digits; with leading zeros, or of more than 15 digits, one by one."""
    if len(digits) > 15 or (len(digits) > 1 and digits.startswith("0")):
        return [_ONES[int(digit)] for digit in digits]
    return number_words(int(digits))
