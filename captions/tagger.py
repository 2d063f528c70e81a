"""Caption -> words with their part of speech and dictionary form.

    "two dogs chase a ball" -> two/CD  dogs/NNS/dog  chase/VBP/chase  a/DT  ball/NN/ball

The tags are those of the Penn Treebank. Four steps: `tokenize` (words), NLTK's averaged perceptron
(tags), `repair` (what that tagger, which learned from newspapers, gets wrong in captions: "a baby
laughs" as two nouns) and `lemmatize` (lemminflect's dictionary).

NLTK's own weights need a download at run time. The same tagger's first weights are in the package
textblob-aptagger (MIT), which no longer imports on Python 3. Only its data file is read, after its
checksum, by an unpickler that can build nothing but dicts, strings, numbers and sets. So everybody
who installs requirements.txt has the same tags. Where a piece is missing, one line says what to
install; there is no silent, worse tagger.
"""

import functools
import hashlib
import importlib.metadata
import io
import pickle
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import regex
from lemminflect import getAllLemmas, getAllLemmasOOV

from cli import UserError

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
    tags = repair(words, [tag for _, tag in load_tagger().tag(words)])
    lemmas = [lemmatize(word, tag) for word, tag in zip(words, tags)]
    return Sentence(words, tags, lemmas)


# ---- words ---------------------------------------------------------------------------------------

WORD = re.compile(r"\d+(?:[.,:]\d+)*[^\W_]*|[^\W_]+(?:['-][^\W_]+)*|[.,;:!?&]")
NOT = re.compile(r"\b(do|does|did|is|are|was|were|ca|could|would|should|wo|has|have|had)n[' ]t\b")
CLITIC = re.compile(r"(?<=[^\W\d_])[' ](s|re|ve|ll)\b")
# The 30 accents on a letter that Unicode's stream-safe format allows (UAX #15), and more. They are
# sorted letter by letter, in a time that grows with the square of their number.
ACCENTS = regex.compile(r"(\p{M}{30})\p{M}+")
CLITICS = {"'s", "'re", "'ve", "'ll", "n't"}


def tokenize(caption: str) -> list[str]:
    """Lower-case words and punctuation, split as the tagger's training text was: dog 's, do n't.

    MSR-VTT writes apostrophes as blanks ("the dog s tail", "they don t"): the same split. Case is
    dropped, because captions use it for titles as often as for names.
    """
    text = normalize(caption).lower().replace("\u2019", "'")
    text = CLITIC.sub(r" '\1", NOT.sub(r"\1 n't", text))
    words = []
    for part in text.split():
        words += [part] if part in CLITICS else WORD.findall(part)
    return words


def normalize(text: str) -> str:
    """The text in NFKC: "ｄｏｇ" -> "dog"."""
    return unicodedata.normalize("NFKC", text if text.isascii() else ACCENTS.sub(r"\1", text))


# ---- NLTK's tagger -------------------------------------------------------------------------------


class PlainUnpickler(pickle._Unpickler):
    """In Python: the one in C can be told to reserve any amount of memory.

    The operation that does so, BYTEARRAY8, is left out here.
    """

    dispatch = {
        op: load for op, load in pickle._Unpickler.dispatch.items() if op != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module, name):
        if (module, name) in {("builtins", "set"), ("__builtin__", "set")}:
            return set
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def load_plain_pickle(data: bytes, encoding: str = "ASCII"):
    """The dicts, lists, sets, texts and numbers of a pickle.

    A pickle may name any function, which unpickling calls. This reader allows `set` and nothing
    else. `encoding` is of Python 2's texts ("bytes" leaves them as bytes). Raises
    pickle.UnpicklingError where it names anything else, and nearly any error where it is damaged.
    """
    return PlainUnpickler(io.BytesIO(data), encoding=encoding).load()


@functools.cache
def load_tagger():
    """NLTK's `PerceptronTagger` with the weights of textblob-aptagger.

    Raises UserError where a package or file is missing, or the file has another checksum.
    """
    try:
        from nltk.tag.perceptron import PerceptronTagger  # here, since it takes a second

        files = importlib.metadata.files(WEIGHTS_PACKAGE) or []
    except ImportError as error:  # PackageNotFoundError is one
        raise UserError(f"{error.name}: this package is not installed; {INSTALL}") from None

    paths = [Path(file.locate()) for file in files if file.name.endswith(".pickle")]
    data = paths[0].read_bytes() if paths and paths[0].is_file() else b""
    if hashlib.sha256(data).hexdigest() != WEIGHTS_SHA256:
        raise UserError(
            f"{WEIGHTS_PACKAGE}: its tagger weights (*.pickle) are missing, or not those of "
            f"version 0.2.0 (checksum); {INSTALL} --force-reinstall"
        )

    tagger = PerceptronTagger(load=False)
    tagger.decode_json_params(load_plain_pickle(data))
    return tagger


# ---- dictionary ----------------------------------------------------------------------------------

OVERRIDES = {
    "people": {"NOUN": ("person",)},  # one concept, as "man" and "men" are
    "persons": {"NOUN": ("person",)},
    "leaves": {"NOUN": ("leaf",), "VERB": ("leave",)},  # the dictionary's first noun is "leave"
    "video": {"NOUN": ("video",)},  # nobody videos anything in a caption
    "videos": {"NOUN": ("video",)},
}


@functools.lru_cache(maxsize=200_000)
def readings(word: str) -> dict[str, tuple[str, ...]]:
    """The dictionary's readings: "sings" -> {"NOUN": ("sing",), "VERB": ("sing",)}, or {}."""
    return OVERRIDES.get(word) or getAllLemmas(word)


@functools.lru_cache(maxsize=200_000)
def lemmatize(word: str, tag: str) -> str:
    """The dictionary form of a noun (NN*) or verb (VB*), by rule where it is unknown."""
    if tag[:2] not in ("NN", "VB"):
        return word
    head, hyphen, last = word.rpartition("-")  # the last part of "back-flips" is inflected
    pos = "NOUN" if tag[0] == "N" else "VERB"
    is_base = tag in ("NN", "NNP", "VB", "VBP")

    known = readings(last).get(pos)
    if not known and not is_base:
        known = getAllLemmasOOV(last, pos).get(pos)
    # an unknown word that is said to be a base form is a misspelling or a name
    if not known or (is_base and last in known):
        return word
    return head + hyphen + known[0]


# ---- repairs -------------------------------------------------------------------------------------

COLOURS = set("red orange yellow green blue purple pink brown black white grey gold silver".split())
SUBORDINATORS = set("while as because if whether although though when until then".split())
PREPOSITIONS = (["in", "front", "of"], ["on", "top", "of"])
CLAUSE_ENDS = {"CC", ",", ".", ":", "WDT", "WP", "WRB"}
CLAUSE = 40  # words in which a clause is looked for: a caption of 10,000 words takes linear time


def repair(words: list[str], tags: list[str]) -> list[str]:
    """Tags without the errors that a tagger of newspapers typically makes on captions.

    A rule stays where F1 on labelled captions (bench/knowledge.py) falls clearly without it.
    """
    # what the dictionary excludes: "elvis" is no verb, "threw" no noun
    tags = [repair_word(words, tags, i) for i in range(len(words))]

    # participles that belong to the noun behind them: "a talking dog" names no action
    for i in range(1, len(words) - 1):
        if tags[i + 1][0] == "N" and is_modifier(tags, i):
            tags[i] = "JJ"

    # the commonest error, verbs taken for nouns: "a baby laughs", "two girls dance"
    for i, word in enumerate(words):
        if tags[i] in ("NN", "NNS") and "VERB" in readings(word):
            tags[i] = verb_tag(words, tags, i) or tags[i]
    return tags


def repair_word(words: list[str], tags: list[str], i: int) -> str:
    """The tag of word i, if the dictionary or its neighbours exclude the one that it has."""
    word, tag, known = words[i], tags[i], readings(words[i])
    following = tag_behind(tags, i)
    if words[i - 1 : i + 2] in PREPOSITIONS:
        return "IN"

    if tag[0] == "N":
        is_adjective = word in COLOURS or ("ADJ" in known and "NOUN" not in known)
        if following[0] == "N" and is_adjective:  # "the orange fish"
            return "JJ"
        if known.keys() == {"VERB"} and word not in known["VERB"]:  # "threw": no noun has that form
            if word.endswith("ing"):
                return "VBG"
            return "VBZ" if word.endswith("s") else "VBD"

    elif tag == "JJ":
        is_last = following[0] not in "NJ"
        if "NOUN" in known and "ADJ" not in known and (is_last or len(known) == 1):
            return "NN"
        if following == "NNS" and is_third_person(words[i + 1]):  # "a small key pushes"
            is_singular = words[phrase_start(tags, i)] in ("a", "an", "one")
            return "NN" if is_singular and ("NOUN" in known or not known) else tag

    elif tag[:2] == "VB" and "VERB" not in known and "AUX" not in known:
        if "ADJ" in known and "NOUN" not in known:  # "striped"
            return "JJ"
        if known or not word.endswith(("ed", "ing", "s")):  # names are not known
            return "NN"
    return tag


def tag_behind(tags: list[str], i: int) -> str:
    return tags[i + 1] if i + 1 < len(tags) else "."


def is_third_person(word: str) -> bool:
    """Whether a word may be a verb in the third person: "laughs", "pushes", not "bus"."""
    known = readings(word)
    return "VERB" in known and word.endswith("s") and word not in known.get("NOUN", ())


def phrase_start(tags: list[str], i: int) -> int:
    """Index of the word before the nouns and adjectives that end at word i."""
    start = i
    while start > max(0, i - CLAUSE) and (tags[start][0] == "N" or tags[start] in ("JJ", "POS")):
        start -= 1
    return start


def is_modifier(tags: list[str], i: int) -> bool:
    """Whether a participle at i belongs to the noun behind it: "some chopped onions"."""
    if tags[i] == "VBG":  # "a frying pan"; but not in "people eating food"
        return tags[i - 1] in ("DT", "PRP$")
    return tags[i] in ("VBN", "VBD") and tags[i - 1] in ("DT", "PRP$", "CD", "IN", "VBG")


def verb_tag(words: list[str], tags: list[str], i: int) -> str | None:
    """The verb tag of a noun that may be a verb, where its clause lacks one; else None."""
    previous = tags[i - 1] if i else ""
    if previous == "CC" and i > 1 and tags[i - 2] in ("VBZ", "VBP", "VB"):  # "talks and laughs"
        return tags[i - 2]
    if clause_has_verb(words, tags, i):
        return None
    if is_third_person(words[i]):  # "a baby laughs", as "a" cannot belong to a plural
        return "VBZ" if previous == "NN" else None
    is_plural = previous == "NNS" and tag_behind(tags, i)[0] != "N"
    return "VBP" if is_plural else None  # "two girls dance"


def clause_has_verb(words: list[str], tags: list[str], i: int) -> bool:
    """Whether the clause of word i has a verb before it."""
    for j in range(i - 1, max(-1, i - CLAUSE), -1):
        if tags[j] in CLAUSE_ENDS or words[j] in SUBORDINATORS:
            return False
        if tags[j][:2] == "VB" or tags[j] == "MD":
            return True
    return False
