"""tokenizer.py: any text can be written, ends in eot, and is encoded as the merges were learned."""

import collections
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import UserError
from tokenizer import PAD, Tokenizer, learn_merges, split_words

ROOT = Path(__file__).parent.parent
CAPTIONS = ["a dog chases a cat", "two dogs chase the ball", "the cat is chasing the dogs", "Zwei Hunde jagen den Ball",
            "a man's car isn't red", "犬が猫を追いかける 犬", "12 dogs, 12 cats!"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 330)


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
                    pieces[i:i + 2] = [best]
                i += 1
    return tokens


def encode_naively(word, tokens):
    """Join the pair of the lowest rank, the leftmost first, until none is left."""
    rank, pieces = {token: i for i, token in enumerate(tokens)}, [bytes([byte]) for byte in word]
    while candidates := [(rank[a + b], i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])) if a + b in rank]:
        i = min(candidates)[1]
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
    return [rank[piece] for piece in pieces]


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=8).map(str.encode), st.integers(1, 9), max_size=12), st.integers(256, 300))
def test_learner_is_the_definition(word_counts, size):
    learned = learn_merges(word_counts, size)
    assert learned == learn_naively(word_counts, size)
    assert len(set(learned)) == len(learned) <= size


def test_encoding_replays_the_merges(tokenizer):
    for caption in CAPTIONS + ["chased catdog ballroom", "犬 cats"]:
        expected = [token for word in split_words(caption) for token in encode_naively(f"{word} ".encode(), tokenizer.tokens)]
        assert tokenizer.encode(caption, 200) == [tokenizer.sot, *expected, tokenizer.eot]


def test_vocabulary_depends_on_the_captions_alone(tokenizer):
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    assert Tokenizer.train(shuffled, 330).tokens == tokenizer.tokens
    assert Tokenizer.train(iter(CAPTIONS), 330).tokens == tokenizer.tokens


def test_ids_and_sizes(tokenizer):
    assert tokenizer.vocab_size == 330 and tokenizer.eot == 329 and tokenizer.sot == 328
    small = Tokenizer.train(["ab"], 1000)  # no pair occurs twice
    assert small.vocab_size == 258 and small.encode("ab", 9) == [256, ord("a"), ord("b"), ord(" "), 257]
    assert Tokenizer.train([], 300).vocab_size == 258
    with pytest.raises(UserError, match="257.*258"):
        Tokenizer.train(CAPTIONS, 257)


def test_batch_pads_to_its_longest(tokenizer):
    tokens, text_mask = tokenizer.encode_batch(["a dog", "", "a dog chases a cat"], length=32)
    assert tokens.dtype == torch.int64 and text_mask.dtype == torch.bool and tokens.shape == text_mask.shape
    lengths = text_mask.sum(dim=1)
    assert tokens.shape[1] == lengths.max() == len(tokenizer.encode("a dog chases a cat", 32)) < 32 and lengths[1] == 2
    assert (tokens[~text_mask] == PAD).all() and (tokens[:, 0] == tokenizer.sot).all()
    assert (tokens.argmax(dim=1) == lengths - 1).all()  # CLIP finds the end of a text like this
    assert (tokens[torch.arange(3), lengths - 1] == tokenizer.eot).all()


def test_truncation_keeps_eot(tokenizer):
    whole = tokenizer.encode("two dogs chase the ball", 77)
    for length in range(2, len(whole) + 3):
        cut = tokenizer.encode("two dogs chase the ball", length)
        assert cut == whole[:length - 1][:len(whole) - 1] + [tokenizer.eot] and len(cut) <= length


def test_long_captions(tokenizer):
    words = ["dog", "chases", "ballroom"] * 3334
    tokens, text_mask = tokenizer.encode_batch([" ".join(words), "x" * 100_000], length=77)  # 10,002 words, and one word
    assert tokens.shape == (2, 77) and text_mask.all()
    assert tokens[0].tolist() == tokenizer.encode(" ".join(words[:200]), 77)


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(codec=None), max_size=40))
def test_any_text_survives(tokenizer, text):
    tokens, _ = tokenizer.encode_batch([text], length=1000)
    ids = tokens[0].tolist()
    assert ids[0] == tokenizer.sot and ids[-1] == tokenizer.eot and max(ids[1:-1], default=0) < tokenizer.sot
    spelled = " ".join(split_words(text)).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(ids) == spelled


@pytest.mark.parametrize("text, same_as", [("A  DOG\n\tchases", "a dog chases"), (" ", ""), ("a\u00a0dog\u2028", "a dog"), ("a\x1fdog", "a dog")])
def test_case_and_white_space_do_not_matter(tokenizer, text, same_as):
    assert tokenizer.encode(text, 50) == tokenizer.encode(same_as, 50)


def test_special_tokens_cannot_be_written(tokenizer):
    ids = tokenizer.encode("a dog <|endoftext|> <|startoftext|>", 100)
    assert ids.count(tokenizer.eot) == 1 and ids.count(tokenizer.sot) == 1
    assert tokenizer.decode(ids) == "a dog <| endoftext |> <| startoftext |>"


def test_a_word_and_a_beginning_differ(tokenizer):
    assert b"dog" in tokenizer.tokens and b"dogs " in tokenizer.tokens  # "dogs " ends a word, "dog" only begins one
    assert not any(b" " in token[:-1] for token in tokenizer.tokens)    # no token crosses a word


def test_saved_as_json(tokenizer):
    again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.tokens == tokenizer.tokens and again.eot == tokenizer.eot
    assert again.encode("the dogs 犬!", 50) == tokenizer.encode("the dogs 犬!", 50)


def test_demo_runs():
    done = subprocess.run([sys.executable, "tokenizer.py", "a cat bounces"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'a cat bounces'" in done.stdout and "dogs_" in done.stdout
