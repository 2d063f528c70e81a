"""A tagged caption -> its verb-noun relations: "a dog chases a cat" -> ["chase cat"].

A *relation* is a verb with the noun that it acts on, without the subject. "A dog chases a cat" is
"chase cat" and "a cat chases a dog" is "chase dog", although both hold the same nouns and verbs.
This order is what makes the knowledge structural. Exactly:

    the direct object                       "a dog chases a cat"                chase cat
    of a passive the patient                "a cat is chased by a dog"          chase cat
    without an object, the noun of the phrase behind the verb   "jumps over a fence"    jump fence
    of a compound only the head             "hits a tennis ball"                hit ball
    of coordinated objects each             "pets a dog and a cat"              pet dog, pet cat

There is no parse tree: the sentence is cut into chunks (noun phrases, verbs, prepositions …), and
patterns of neighbouring chunks say what belongs together.
"""

from typing import NamedTuple

from captions.tagger import SUBORDINATORS, Sentence

# Words that say "this is a caption", only count, or stand for others: no concepts. Relations look
# through the nouns among them: "folds a piece of paper" is "fold paper".
STOP_NOUNS = set(
    """video clip footage lot kind type sort bunch piece group pair way thing stuff something
    someone somebody anyone anything everyone everybody everything nothing nobody one other
    """.split()
)
STOP_VERBS = set("be have do can will".split())

# every other tag is a "clause": it ends whatever it stands beside
KINDS = {
    "PRP": "pronoun", "WP": "that", "EX": "pronoun", "IN": "prep", "TO": "prep", "RB": "adv",
    "RBR": "adv", "RBS": "adv", "RP": "adv", "CC": "and", ",": "and", "WDT": "that", "MD": "verb",
}  # fmt: skip
DETERMINERS = {"DT", "PDT", "PRP$", "CD"}
NOUN_PHRASE = DETERMINERS | {"JJ", "JJR", "JJS", "POS", "NN", "NNS", "NNP", "NNPS"}


class Chunk(NamedTuple):
    """A noun phrase, or one other word: its kind, and the index of its head word."""

    kind: str
    head: int


def find_relations(s: Sentence) -> list[str]:
    """The "verb noun" pairs; both words are concepts of their own, too."""
    chunks = make_chunks(s)
    pairs, patients = [], []
    for c, (kind, head) in enumerate(chunks):
        if kind != "verb" or is_auxiliary(s, head):
            continue
        if is_passive(s, chunks, c):  # "is sliced and put into a bowl": the same patient
            patients = subject_heads(s, chunks, c) or patients
            heads = patients
        else:
            patients, heads = [], object_heads(s, chunks, c)

        nouns = [s.lemmas[i] for i in heads]
        pairs += [f"{s.lemmas[head]} {n}" for n in nouns if len(n) > 1 and n not in STOP_NOUNS]
    return pairs


def is_auxiliary(s: Sentence, i: int) -> bool:
    """Whether the verb at word i names no action or state of its own."""
    if s.lemmas[i] == "get":  # "gets pinned"
        return s.tags[i + 1 : i + 2] == ["VBN"]
    is_future = s.words[i] == "going" and s.tags[i + 1 : i + 3] == ["TO", "VB"]
    return is_future or s.lemmas[i] in STOP_VERBS or len(s.lemmas[i]) < 2  # "is going to kiss"


def make_chunks(s: Sentence) -> list[Chunk]:
    """The sentence as chunks; a noun phrase is one, headed by its last noun.

    An "end" chunk pads the left and three pad the right, so that patterns need no bounds check.
    """
    chunks, in_phrase = [Chunk("end", -1)], False
    for i, (word, tag) in enumerate(zip(s.words, s.tags)):
        if tag in NOUN_PHRASE:
            begins_another = tag in DETERMINERS and chunks[-1].kind == "noun"  # "the dog | a bone"
            if not in_phrase or begins_another:
                chunks.append(Chunk("pronoun", i))  # until its noun comes: "this", "both"
            if tag[0] == "N":
                chunks[-1] = Chunk("noun", i)
            in_phrase = True
            continue

        in_phrase = False
        kind = "verb" if tag[:2] == "VB" else KINDS.get(tag, "clause")
        if word == "that":
            kind = "that"
        elif word in SUBORDINATORS:
            kind = "clause"
        chunks.append(Chunk(kind, i))

    return chunks + [Chunk("end", -1)] * 3


def skip(chunks: list[Chunk], c: int, *kinds: str) -> int:
    while chunks[c].kind in kinds:
        c += 1
    return c


def is_passive(s: Sentence, chunks: list[Chunk], c: int) -> bool:
    """Whether the verb at chunk c acts on what stands before it."""
    tag = s.tags[chunks[c].head]
    if tag not in ("VBN", "VBD") or chunks[skip(chunks, c + 1, "adv")].kind == "noun":
        return False
    left = c - 1
    while chunks[left].kind == "adv":
        left -= 1

    kind, head = chunks[left]
    if kind == "verb" and s.lemmas[head] in ("be", "get", "have"):
        return s.lemmas[head] != "have"  # "is chased" against "has chased"
    return tag == "VBN"  # "a tub filled with ice"


def coordinated(s: Sentence, chunks: list[Chunk], c: int) -> tuple[list[int], int]:
    """Heads of the noun phrase at c and of those joined to it; the last of these chunks."""
    heads = []
    while True:
        while is_stop_phrase(s, chunks, c):
            c += 2  # "a piece of paper" is paper
        heads.append(chunks[c].head)

        # "pets a dog and a cat runs away": the cat is a subject, if a verb follows it
        following = skip(chunks, c + 1, "and")
        kind, verb = chunks[skip(chunks, following + 1, "adv")]
        # in "wears a shirt and jeans is dancing" the jeans do not dance
        agrees = kind == "verb" and (s.tags[chunks[following].head], s.tags[verb]) != ("NNS", "VBZ")
        if following == c + 1 or chunks[following].kind != "noun" or agrees:
            return heads, c
        c = following


def is_stop_phrase(s: Sentence, chunks: list[Chunk], c: int) -> bool:
    is_of = s.words[chunks[c + 1].head] == "of" and chunks[c + 2].kind == "noun"
    return s.lemmas[chunks[c].head] in STOP_NOUNS and is_of


def object_heads(s: Sentence, chunks: list[Chunk], c: int) -> list[int]:
    """Heads of what the active verb at chunk c acts on."""
    after = skip(chunks, c + 1, "adv")
    if chunks[after].kind == "noun":
        heads, last = coordinated(s, chunks, after)
        if chunks[last + 1].kind == "noun" and chunks[last + 2].kind != "verb":
            heads += coordinated(s, chunks, last + 1)[0]  # "gives the dog a bone"
        return heads
    if chunks[after].kind == "pronoun":  # "shows you the ball"
        is_noun = chunks[after + 1].kind == "noun"
        return coordinated(s, chunks, after + 1)[0] if is_noun else []

    # "the ball that a dog chases", "the ball she throws"
    subject = before_auxiliaries(s, chunks, c - 1, "adv")
    if chunks[subject].kind in ("noun", "pronoun"):
        has_that = chunks[subject - 1].kind == "that"
        thing = chunks[subject - 2] if has_that else chunks[subject - 1]
        if thing.kind == "noun" and (has_that or chunks[subject].kind == "pronoun"):
            return [thing.head]

    # "jumps over a fence"
    target = skip(chunks, after, "prep", "adv")
    has_target = target > after and chunks[target].kind == "noun"
    return coordinated(s, chunks, target)[0] if has_target else []


def before_auxiliaries(s: Sentence, chunks: list[Chunk], c: int, *kinds: str) -> int:
    """The chunk before c that is neither an auxiliary verb nor of these kinds."""
    while True:
        kind, head = chunks[c]
        if kind not in kinds and not (kind == "verb" and is_auxiliary(s, head)):
            return c
        c -= 1


def subject_heads(s: Sentence, chunks: list[Chunk], c: int) -> list[int]:
    """Heads of the subject of the passive verb at chunk c; of "a tub filled with ice" the tub."""
    j = before_auxiliaries(s, chunks, c - 1, "adv", "that")
    if chunks[j].kind != "noun":
        return []

    # "a toy on a table is shown" is about the toy
    while chunks[j - 1].kind == "prep" and chunks[j - 2].kind == "noun":
        if is_stop_phrase(s, chunks, j - 2):
            break
        j -= 2

    return [chunks[j].head]
