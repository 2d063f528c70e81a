"""tokenizer.py: any text can be written, ends in eot, and is encoded as the merges were learned."""

import collections
import gzip
import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from captions.tagger import tokenize
from captions.tokenizer import PAD, Tokenizer, clean, learn_merges, split_words
from cli import UserError

ROOT = Path(__file__).parent.parent
CAPTIONS = ["a dog chases a cat", "two dogs chase the ball", "the cat is chasing the dogs"]
CAPTIONS += ["Zwei Hunde jagen den Ball", "a man's car isn't red", "犬が猫を追いかける 犬"]
CAPTIONS += ["12 dogs, 12 cats!"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS * 3, 330)


def learn_naively(word_counts, size):
    """The definition: count every joined pair of neighbours, join the best everywhere, again."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = {word: [bytes([byte]) for byte in word] for word in word_counts}
    while len(tokens) < size:
        frequency = collections.Counter()
        for word, pieces in words.items():
            for left, right in zip(pieces, pieces[1:]):
                frequency[left + right] += word_counts[word]
        if not frequency or max(frequency.values()) < 2:
            break
        best = min(frequency, key=lambda token: (-frequency[token], token))
        tokens.append(best)
        for pieces in words.values():
            i = 0
            while i + 1 < len(pieces):
                if pieces[i] + pieces[i + 1] == best:
                    pieces[i : i + 2] = [best]
                i += 1
    return tokens


def encode_naively(word, tokens):
    """Join the pair of the lowest rank, the leftmost first, until none is left."""
    rank, pieces = {token: i for i, token in enumerate(tokens)}, [bytes([byte]) for byte in word]
    while candidates := [
        (rank[a + b], i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])) if a + b in rank
    ]:
        i = min(candidates)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return [rank[piece] for piece in pieces]


WORD_COUNTS = st.dictionaries(
    st.text("abc", min_size=1, max_size=8).map(str.encode), st.integers(1, 9), max_size=12
)


@settings(deadline=None, max_examples=60)
@given(WORD_COUNTS, st.integers(256, 300))
def test_learner_is_the_definition(word_counts, size):
    learned = learn_merges(word_counts, size)
    assert learned == learn_naively(word_counts, size)
    assert len(set(learned)) == len(learned) <= size


def test_encoding_replays_the_merges(tokenizer):
    # a special token cannot be written
    for caption in [*CAPTIONS, "chased catdog ballroom", "<|endoftext|> <|startoftext|>"]:
        words = [f"{word} ".encode() for word in split_words(caption)]
        expected = [token for word in words for token in encode_naively(word, tokenizer.tokens)]
        assert tokenizer.encode(caption, 200) == [tokenizer.sot, *expected, tokenizer.eot]


def test_ids_and_sizes(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.sot, tokenizer.eot) == (330, 328, 329)
    small = Tokenizer.train(["ab"], 1000)  # no pair occurs twice
    assert small.vocab_size == 258 and small.encode("ab", 9) == [256, *b"ab ", 257]
    with pytest.raises(UserError, match="257.*258"):
        Tokenizer.train(CAPTIONS, 257)


def test_batch_pads_to_its_longest(tokenizer):
    captions = ["a dog", "", "a dog chases a cat"]
    rows = [tokenizer.encode(caption, 32) for caption in captions]
    tokens, text_mask = tokenizer.encode_batch(captions, length=32)
    assert (tokens.dtype, text_mask.dtype) == (torch.int64, torch.bool)
    assert tokens.shape == text_mask.shape == (3, len(rows[2]))
    for row, mask, ids in zip(tokens, text_mask, rows):
        assert row[mask].tolist() == ids and (row[~mask] == PAD).all()
        assert mask[: len(ids)].all() and row.argmax() == len(ids) - 1  # so CLIP finds the end


def test_truncation_keeps_eot(tokenizer):
    whole = tokenizer.encode("two dogs chase the ball", 77)
    for length in range(2, len(whole) + 3):
        cut = tokenizer.encode("two dogs chase the ball", length)
        assert cut == whole[:-1][: length - 1] + [tokenizer.eot] and len(cut) <= length


def test_texts_that_take_long_to_mend_are_cut():
    """Unicode sorts the accents of a letter in quadratic time: 100 kB would take seconds."""
    accents = "\u0301\u0327"
    assert clean("e" + 50_000 * accents) == clean("e" + 1999 * accents + accents[0])
    assert tokenize("e" + 50_000 * accents) == tokenize("e" + 15 * accents)


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(codec=None), max_size=40))
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text, 1000)
    assert ids[0] == tokenizer.sot and ids[-1] == tokenizer.eot
    assert max(ids[1:-1], default=0) < tokenizer.sot
    spelled = " ".join(split_words(text)).encode("utf-16", "surrogatepass")
    assert tokenizer.decode(ids) == spelled.decode("utf-16", "replace")


def test_captions_are_cleaned_as_by_clip():
    for text, cleaned in (
        ("A  DOG\n\tchases", "a dog chases"),
        ("a\u00a0dog\u2028", "a dog"),
        ("a\x1fdog", "adog"),
        ("cafÃ© &amp;amp; bar", "café & bar"),
        ("a man’s", "a man's"),
        (f"&#{'9' * 5000};", "\ufffd"),  # Python's int refuses so many digits
        ("e\u0301", "é"),
    ):
        assert clean(text) == cleaned


# ---- CLIP's own tokenizer ------------------------------------------------------------------------

NO_OPEN_CLIP = "open_clip is not installed (pip install --no-deps open-clip-torch==3.3.0)"
CORPUS = ROOT.parent / "shared" / "msrvtt_mini" / "MSRVTT_data.json"


@pytest.fixture(scope="session")
def clip_pair():
    """(ours, open_clip's SimpleTokenizer), both with CLIP's vocabulary from the package."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip(NO_OPEN_CLIP)
    folder = Path(package.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Tokenizer.from_clip(folder, 49408), module.SimpleTokenizer()


def test_ids_of_real_captions_are_clips_own(clip_pair):
    if not CORPUS.is_file():
        pytest.skip("the MSR-VTT captions in ../shared are not on this machine")
    ours, theirs = clip_pair
    sentences = json.loads(CORPUS.read_text(encoding="utf-8"))["sentences"]
    captions = sorted({sentence["caption"] for sentence in sentences})
    odd = [caption for caption in captions if not caption.isascii() or "&" in caption]
    for caption in random.Random(0).sample(captions, 4000) + odd:
        assert ours.encode(caption, 1000) == [49406, *theirs.encode(caption), 49407], caption


ODD = ["'S", "'ſ", "can't", "&amp;amp;", "&#8217;", "â€™", "ﬁ", "ΣΣ", "İ", "1½2", "</w>"]
ODD += ["<b>", "_", " \u00a0", "\ud83d\ude00", "👨\u200d👩", "dog's-eye", "\x1b[0m", "\r\n"]
ODD += ["e\u0301"]
PIECES = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(ODD)
PIECES = PIECES | st.text("adgo's 1!", max_size=9)


@settings(deadline=None, max_examples=400)
@given(st.lists(PIECES).map("".join))
@example("&#8123;\n<")  # entities in the line before the first "<"
def test_ids_of_any_text_are_clips_own(clip_pair, text):
    ours, theirs = clip_pair
    expected = theirs.encode(text)
    assert ours.encode(text, 10_000) == [ours.sot, *expected, ours.eot]
    if len(expected) > 18:
        assert ours.encode(text, 20) == [ours.sot, *expected[:18], ours.eot]


MERGES = "#version: 0.2\nd o\ndo g</w>\nÃ ©</w>\nt h\n"


def test_each_file_of_merges_gives_the_same_tokens(tmp_path):
    with gzip.open(tmp_path / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
        file.write(MERGES + "x y\n")  # OpenAI's holds more merges than were used
    packed = Tokenizer.from_clip(tmp_path, 518)
    (tmp_path / "merges.txt").write_text(MERGES, encoding="utf-8")
    found = Tokenizer.from_clip(tmp_path, 518)
    assert found.tokens == packed.tokens and len(set(found.tokens)) == 516
    assert (found.tokens[0], found.tokens[256]) == (b"!", b"! ")
    assert found.tokens[512:] == [b"do", b"dog ", "é ".encode(), b"th"]
    assert found.encode("the café dog", 99)[-2] == 513


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("other.txt", b"", "CLIP's vocabulary is not there; put its merges.txt"),
        ("bpe_simple_vocab_16e6.txt.gz", b"hello", "16e6.txt.gz: not a file of CLIP's merges"),
        ("merges.txt", b"#version: 0.2\na b c\n", "merges.txt: not a file of CLIP's merges"),
        ("merges.txt", MERGES.encode(), "gives 518 tokens, the weights have 600"),
    ],
)
def test_unusable_vocabularies_are_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        Tokenizer.from_clip(tmp_path, 600)
    assert "\n" not in str(error.value)
