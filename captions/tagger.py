"""Caption → words with their part of speech and dictionary form.

    "two dogs chase a ball" → two/CD  dogs/NNS/dog  chase/VBP/chase  a/DT  ball/NN/ball        (Penn Treebank tags)

Four steps: `tokenize` (words), `tag_words` (NLTK's averaged perceptron: for each word, left to right, the tag whose
weights for 14 features of the word, its neighbours and the two tags before sum highest), `repair` (what that tagger,
which learned from newspapers, gets wrong in captions: "a baby laughs" as two nouns), and `lemmatize` (lemminflect's
dictionary).

NLTK's own weights need a download at run time. The same tagger's first weights are in the package textblob-aptagger
(MIT), which no longer imports on Python 3; only its data file is read, after its checksum, by an unpickler that can
build nothing but dicts, strings, numbers and sets. Everybody who installs requirements.txt has the same tags; where a
piece is missing, one line says what to install, never a silent, worse tagger. The alternative, spaCy, tags
better but slower, and its models are in no package registry.

    python tagger.py a baby laughs
"""

import functools
import hashlib
import importlib.metadata
import io
import pickle
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cli import UserError, run

WEIGHTS_PACKAGE = "textblob-aptagger"
WEIGHTS_SHA256 = "1109164b3d28dce58f96b763128bab2fd8754c3921fd3330de2724ac6d1ada7c"
INSTALL = "pip install nltk lemminflect && pip install --no-deps textblob-aptagger==0.2.0"


class Sentence(NamedTuple):
    """One caption, taken apart: three lists of the same length."""
    words: list[str]
    tags: list[str]
    lemmas: list[str]


def parse(caption: str) -> Sentence:
    """The caption's words, repaired tags and lemmas. Raises UserError as `load_tagger`."""
    words = tokenize(caption)
    tags = repair(words, tag_words(load_tagger(), ["I" if word == "i" else word for word in words]))
    return Sentence(words, tags, [lemmatize(word, tag) for word, tag in zip(words, tags)])


# Words ---------------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"\d+(?:[.,:]\d+)*[^\W_]*|[^\W_]+(?:['-][^\W_]+)*|[.,;:!?&]")
_NOT = re.compile(r"\b(do|does|did|is|are|was|were|ca|could|would|should|wo|has|have|had)n[' ]t\b")
_CLITIC = re.compile(r"(?<=[^\W\d_])[' ](s|re|ve|ll)\b")
_CLITICS = frozenset(["'s", "'re", "'ve", "'ll", "n't"])


def tokenize(caption: str) -> list[str]:
    """Lower-case words and punctuation, split as the tagger's training text was: "dog's" is dog 's, "don't" is do n't.

    MSR-VTT writes apostrophes as blanks ("the dog s tail", "they don t"): the same split. Case is dropped, because
    captions use it for titles as often as for names. """
    text = unicodedata.normalize("NFKC", caption).lower().replace("\u2019", "'")
    text = _CLITIC.sub(r" '\1", _NOT.sub(r"\1 n't", text))
    return [word for part in text.split() for word in ([part] if part in _CLITICS else _WORD.findall(part))]


# Tags ----------------------------------------------------------------------------------------------------------------

class _PlainUnpickler(pickle._Unpickler):
    # in Python: the one in C can be told to reserve any amount of memory, as the operation left out here can
    dispatch = {op: load for op, load in pickle._Unpickler.dispatch.items() if op != pickle.BYTEARRAY8[0]}

    def find_class(self, module, name):
        if (module, name) in {("builtins", "set"), ("__builtin__", "set")}:
            return set
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def load_plain_pickle(data: bytes, encoding: str = "ASCII"):
    """The dicts, lists, sets, texts and numbers of a pickle. A pickle may name any function, which unpickling calls:
    this reader allows `set` and nothing else. `encoding` is of Python 2's texts ("bytes" leaves them as bytes).

    Raises pickle.UnpicklingError where it names anything else, and nearly any exception where it is damaged.
    """
    return _PlainUnpickler(io.BytesIO(data), encoding=encoding).load()


@functools.cache
def load_tagger():
    """NLTK's `PerceptronTagger` with the weights of textblob-aptagger. Raises UserError where a package or file is
    missing, or where the file is not the one that these numbers were made with."""
    try:
        import lemminflect  # noqa: F401  (both here, not above: a missing package is one line, and imports stay quick)
        from nltk.tag.perceptron import PerceptronTagger
        files = importlib.metadata.files(WEIGHTS_PACKAGE) or []
    except ImportError as error:  # PackageNotFoundError is one
        raise UserError(f"{error.name}: this package is not installed; {INSTALL}") from None
    paths = [Path(file.locate()) for file in files if file.name.endswith(".pickle")]
    if not paths or not paths[0].is_file():
        raise UserError(f"{WEIGHTS_PACKAGE}: its tagger weights (*.pickle) are missing; {INSTALL} --force-reinstall")
    data = paths[0].read_bytes()
    if hashlib.sha256(data).hexdigest() != WEIGHTS_SHA256:
        raise UserError(f"{paths[0]}: not the tagger weights of version 0.2.0 (checksum); {INSTALL} --force-reinstall")
    tagger = PerceptronTagger(load=False)
    tagger.decode_json_params(load_plain_pickle(data))
    return tagger


def tag_words(tagger, words: Sequence[str]) -> list[str]:
    """The tag of each word: exactly `tagger.tag(words)`, in about half its time (bench/knowledge.py).

    The same features, summed in the same order. Scores start as a copy of the bias row, whose keys run from the last
    label to the first, so that the first maximum is the one that NLTK's alphabetic tie-break picks. """
    weights, bias = tagger.model.weights, _bias_scores(tagger)
    context = ["-START-", "-START2-", *map(tagger.normalize, words), "-END-", "-END2-"]
    previous, before = "-START-", "-START2-"  # the tags at i-1 and i-2
    tags = []
    for i, word in enumerate(words):
        tag = tagger.tagdict.get(word)  # frequent words of one tag
        if not tag:
            left2, left, this, right, right2 = context[i:i + 5]
            scores = bias.copy()
            for feature in (f"i suffix {word[-3:]}", f"i pref1 {word[:1]}", f"i-1 tag {previous}", f"i-2 tag {before}",
                            f"i tag+i-2 tag {previous} {before}", f"i word {this}", f"i-1 tag+i word {previous} {this}",
                            f"i-1 word {left}", f"i-1 suffix {left[-3:]}", f"i-2 word {left2}", f"i+1 word {right}",
                            f"i+1 suffix {right[-3:]}", f"i+2 word {right2}"):
                if feature in weights:
                    for label, weight in weights[feature].items():
                        scores[label] += weight
            tag = max(scores, key=scores.__getitem__)
        tags.append(tag)
        previous, before = tag, previous
    return tags


@functools.lru_cache(maxsize=1)
def _bias_scores(tagger) -> dict[str, float]:
    row = tagger.model.weights["bias"]
    return {label: row.get(label, 0.0) for label in sorted(tagger.classes, reverse=True)}


# Dictionary ----------------------------------------------------------------------------------------------------------

_OVERRIDES = {
    "people": {"NOUN": ("person",)}, "persons": {"NOUN": ("person",)},  # one concept, as "man" and "men" are
    "leaves": {"NOUN": ("leaf",), "VERB": ("leave",)},  # the dictionary's first noun is "leave"
    "video": {"NOUN": ("video",)}, "videos": {"NOUN": ("video",)},  # nobody videos anything in a caption
}


@functools.lru_cache(maxsize=200_000)
def readings(word: str) -> dict[str, tuple[str, ...]]:
    """The dictionary's readings of a word: "sings" → {"NOUN": ("sing",), "VERB": ("sing",)}; {} where it is unknown."""
    from lemminflect import getAllLemmas
    return _OVERRIDES.get(word) or getAllLemmas(word)


@functools.lru_cache(maxsize=200_000)
def lemmatize(word: str, tag: str) -> str:
    """The dictionary form of a noun (NN*) or verb (VB*), by rule where it is unknown; other words as they are."""
    if tag[:2] not in ("NN", "VB"):
        return word
    head, hyphen, last = word.rpartition("-")  # of "back-flips", "self-narrates" the last part is inflected
    pos, is_base = ("NOUN" if tag[0] == "N" else "VERB"), tag in ("NN", "NNP", "VB", "VBP")
    known = readings(last).get(pos)
    if not known and not is_base:
        from lemminflect import getAllLemmasOOV
        known = getAllLemmasOOV(last, pos).get(pos)
    if not known or (is_base and last in known):  # unknown and said to be a base form: a misspelling or a name, kept
        return word
    return head + hyphen + known[0]


# Repairs -------------------------------------------------------------------------------------------------------------

_PARTICLES = frozenset("""up down out off over on in away back about around along through by apart together across
    open""".split())
_COLOURS = frozenset("red orange yellow green blue purple violet pink brown black white grey gray gold silver".split())
_NEVER_HEADS = _COLOURS | frozenset("other many such same more most less few several own full".split())
_BE = frozenset("is are was were be been being 's 're".split())
_BEFORE_INFINITIVE = frozenset("do does did let lets letting help helps helped helping go goes make makes made".split())
SUBORDINATORS = frozenset("while as because if whether although though when until then meanwhile".split())
_FINITE = frozenset(["VBZ", "VBP", "VBD", "MD"])
_BOUNDARY = frozenset(["CC", ",", ".", ":", "WDT", "WP", "WRB"])
_CLAUSE = 40  # words each way in which a clause is looked for; keeps a 10,000-word caption linear


def repair(words: list[str], tags: list[str]) -> list[str]:
    """Tags with the errors undone that a tagger of newspapers typically makes on captions.

    Word by word: what the dictionary excludes ("elvis" is no verb, "threw" no noun). Then participles that belong to
    the noun behind them ("a talking dog" names no action). Then, in captions the commonest error, verbs taken for
    nouns: "a baby laughs", "two girls dance", "talks and laughs", "cut the onion". """
    tags = [_repair_word(words, tags, i) for i in range(len(words))]
    for i in range(1, len(words) - 1):
        if tags[i] in ("VBG", "VBN", "VBD") and tags[i + 1][0] == "N" and _is_modifier(words, tags, i):
            tags[i] = "JJ"
    verbless = not any(tag[:2] == "VB" or tag == "MD" for tag in tags)
    for i, word in enumerate(words):
        if tags[i] in ("NN", "NNS") and "VERB" in readings(word):
            tags[i] = _verb_reading(words, tags, i, verbless) or tags[i]
    return tags


def _repair_word(words: list[str], tags: list[str], i: int) -> str:
    """The tag of word i, if the dictionary or its neighbours exclude the one that it has."""
    word, tag, known = words[i], tags[i], readings(words[i].rpartition("-")[2])
    previous, following = tags[i - 1] if i else "", tags[i + 1] if i + 1 < len(tags) else "."
    if word in ("front", "top") and words[i - 1:i] in (["in"], ["on"]) and words[i + 1:i + 2] == ["of"]:
        return "IN"
    if tag[0] == "N":
        if following[0] == "N" and (word in _COLOURS or ("ADJ" in known and "NOUN" not in known)):  # "the orange fish"
            return "JJ"
        if word.endswith("ing") and words[i - 1:i] and words[i - 1] in _BE:
            return "VBG"
        if known.keys() == {"VERB"} and word not in known["VERB"]:  # "threw", "speaks": forms that no noun has
            if word.endswith("ing"):
                return tag if following[0] == "N" or previous == "DT" else "VBG"  # "a boxing match", "the making of"
            if not word.endswith("s"):
                return "VBD"
            return "VBZ" if previous[:1] == "N" or previous in ("PRP", "CC", "RB") else tag
    elif tag in ("RP", "FW", "UH"):
        return tag if word in _PARTICLES else "NN"
    elif tag == "RB":
        return "NN" if "NOUN" in known and not known.keys() & {"ADV", "ADJ"} else tag
    elif tag == "JJ" and word not in _NEVER_HEADS:
        is_last = following[0] not in "NJ" and following not in ("CC", "VBN")
        ends_phrase = is_last and (following in ("IN", "TO", ".") or following in _FINITE) \
            and previous in ("DT", "PRP$", "JJ", "NN", "VBG")
        if known.keys() == {"NOUN"} or (ends_phrase and (not known or "NOUN" in known)):  # "a lady", "a musician plays"
            return "NN"
        if "NOUN" in known and "ADJ" not in known and is_last:  # "in uniforms"
            return "NN"
        if (not known or "NOUN" in known) and following == "NNS" and _is_third_person(words[i + 1]) \
                and words[_phrase_start(tags, i + 1)] in ("a", "an", "one"):  # "a small key pushes", "a major speaks"
            return "NN"
    elif tag[:2] == "VB":
        if "VERB" not in known and "AUX" not in known:
            return _without_verb_reading(word, tag, known, previous)
        after_verb = previous in ("VBZ", "VBD", "VBG") and words[i - 1] not in _BEFORE_INFINITIVE
        if tag == "VB" and after_verb and "NOUN" in known:  # "loses control"
            return "NN"
    return tag


def _without_verb_reading(word: str, tag: str, known: dict, previous: str) -> str:
    """What a word is that was tagged as a verb, but which the dictionary does not know as one."""
    if word in _COLOURS or ("ADJ" in known and "NOUN" not in known):  # "striped", "haired"
        return "JJ"
    if "NOUN" in known:
        return "NNS" if tag == "VBZ" else "NN"
    if tag in ("VB", "VBP") or (tag in ("VBD", "VBN") and not word.endswith("ed")):  # names
        return "NN"
    if tag == "VBZ" and (not word.endswith("s") or previous in ("VBG", "VBN", "JJ", "DT", "IN", "PRP$")):
        return "NNS"  # "wearing sunglasses"
    return tag


def _is_third_person(word: str) -> bool:
    """Whether a word may be a verb in the third person: "laughs", "pushes", not "bus"."""
    known = readings(word)
    return "VERB" in known and word.endswith("s") and word not in known.get("NOUN", ())


def _phrase_start(tags: list[str], i: int) -> int:
    """Index of the determiner or number that opens the noun phrase before word i, or of the word before the phrase."""
    start = i - 1
    while start > 0 and i - start < _CLAUSE and (tags[start][0] == "N" or tags[start] in ("JJ", "POS")):
        start -= 1
    return start


def _is_modifier(words: list[str], tags: list[str], i: int) -> bool:
    """Whether the participle at i belongs to the noun behind it: "a frying pan", "some chopped onions"."""
    before = i - 1
    skipped = ("JJ",) if tags[i] == "VBG" else ("JJ", "RB")  # "poorly dressed people"
    while before > 0 and tags[before] in skipped and words[before] != "other":
        before -= 1
    if tags[i] == "VBG":  # "the other playing guitar", "people eating food" are none
        return words[before] in ("a", "an", "the") or tags[before] == "PRP$"
    return tags[before] in ("DT", "PRP$", "CD", "IN", "VBG") and words[before] != "being"


def _verb_reading(words: list[str], tags: list[str], i: int, verbless: bool) -> str | None:
    """The verb tag of a word that is tagged as a noun, may be a verb, and stands where a clause lacks its verb; else
    None.

    `verbless`: the tagger found no verb in the whole caption, which is nearly always an error.
    """
    previous, following = tags[i - 1] if i else "", tags[i + 1] if i + 1 < len(tags) else "."
    third_person = _is_third_person(words[i])
    if previous == "CC" and i > 1 and tags[i - 2] in ("VBZ", "VBP", "VB"):  # "talks and laughs"
        return tags[i - 2]
    if previous in ("", "CC") and following in ("DT", "PRP$", "PRP"):
        return "VBZ" if third_person else "VB"  # "cut the onion", "draws a sword and fights a man"
    if previous[:1] != "N":
        return None
    if words[i].endswith("ing"):  # "a man playing on the ground"
        return "VBG" if verbless and following[0] != "N" else None

    start = _phrase_start(tags, i)
    determined = tags[start] in ("DT", "PRP$", "CD")
    joint = start - 1 if determined else start  # what joins the phrase to the words before it, if any
    is_relative = joint > 0 and words[joint] in ("that", "which") and tags[joint - 1][0] == "N"
    if is_relative and (third_person or previous == "NNS"):
        return "VBZ" if third_person else "VBP"  # "the ball that the dog chases"
    if joint >= 0 and tags[joint] == "IN":  # "shots of a soccer video game" is one long noun phrase, but
        is_place = words[joint] in ("in", "with", "on", "at", "by", "near")
        if not (is_place and verbless and third_person and following in ("IN", "TO", "RB", "RP", "DT", "PRP$")):
            return None  # "a man in snorkel gear swims in a pool"
    if third_person:  # "a baby laughs", as "a" cannot belong to a plural; "obama meets" if nothing else is a verb
        is_singular = previous == "NN" and (verbless or words[start] in ("a", "an", "one"))
        return "VBZ" if is_singular and _lacks_verb(words, tags, i) else None
    is_plural = previous == "NNS" or (tags[start] == "CD" and words[start] != "one")
    if is_plural and following[0] != "N" and words[start] not in ("a", "an") and _lacks_verb(words, tags, i):
        return "VBP"  # "two girls dance", "two fish swim"
    are_two = joint > 0 and tags[joint] == "CC" and tags[joint - 1][0] == "N"
    if verbless and (following in ("DT", "PRP$") or (are_two and following[0] != "N")):
        return "VBP"  # "a man and a woman sing", also "a boy play the guitar"
    return None


def _lacks_verb(words: list[str], tags: list[str], i: int) -> bool:
    """Whether the clause around i has no verb before i and no finite verb behind it."""
    def is_boundary(j):
        return tags[j] in _BOUNDARY or words[j] in SUBORDINATORS
    for j in range(i - 1, max(-1, i - _CLAUSE), -1):
        if is_boundary(j):
            break
        if tags[j][:2] == "VB" or tags[j] == "MD":
            return False
    for j in range(i + 1, min(len(tags), i + _CLAUSE)):
        if is_boundary(j):
            break
        if tags[j] in _FINITE:
            return False
    return True


def main() -> None:
    """Demo: one caption's words, tags before and after the repairs, and lemmas."""
    caption = " ".join(sys.argv[1:]) or "a baby laughs and two girls dance"
    sentence = parse(caption)
    raw = tag_words(load_tagger(), sentence.words)
    for word, before, tag, lemma in zip(sentence.words, raw, *sentence[1:]):
        print(f"{word:>16}  {before:>4} {'→ ' + tag if tag != before else '':6}  {lemma}")


if __name__ == "__main__":
    run(main)
