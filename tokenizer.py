"""Caption → integer tokens: byte-pair encoding, learned from the training captions.

A vocabulary of whole words cannot spell a new word; one of letters makes long sequences. Byte-pair encoding (BPE) starts from
the 256 bytes, so that any text can be written, and adds the pair of neighbours that is most frequent in the training captions
as a new token, again and again, until the vocabulary is full:

    d·o·g·_  c·h·a·s·e·s·_   →  do·g·_  c·ha·s·es·_   →  …  →  dog_  chases_        "_": the space behind a word

Encoding replays the merges in the order in which they were learned. A caption is lower-cased, its white space made single,
then split into words, numbers' digits and punctuation; each piece gets one space behind it, so that "dog_" as a word and "dog"
as the beginning of "dogma" are different tokens, and no token crosses a word. This is the scheme of CLIP (its mark `</w>` is
our trailing space), after Sennrich et al., https://arxiv.org/abs/1508.07909.

    encode_batch(["a dog runs"], length=8) → tokens    [[sot, a_, dog_, runs_, eot]]      int64 [B, L]
                                             text_mask [[  1,  1,   1,     1,   1]]       bool  [B, L], True = real token

The start and end tokens, sot and eot, are the two highest ids, eot the highest, because CLIP finds the end of a text by argmax.
L is the longest caption of the batch, at most `length`: short batches cost less; a longer caption loses its last words, never
its eot. Padding is id 0 and False in `text_mask`.

The learner below is ours and takes seconds: it works on *distinct* words with their counts, and a merge touches only the
words that hold the pair. Encoding is tiktoken's Rust, given our ranks, so that nothing is downloaded; `to_dict` puts the
vocabulary into the checkpoint, and no other file is needed to evaluate. Special tokens cannot be written by a caption:
"<|endoftext|>" in a text is spelled out like any other word.

    python tokenizer.py "a dog chases the cats"
"""

import base64
import collections
import heapq
import sys
from collections.abc import Iterable

import regex
import tiktoken
import torch

from cli import UserError, run

# CLIP's own: English clitics, runs of letters, single digits, runs of anything else that is not white space
WORD_PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
PAD = 0


def split_words(caption: str) -> list[str]:
    """The pieces that BPE works on, lower-case, without white space: "Two dogs' toys" → two · dogs · ' · toys."""
    return WORD_PATTERN.findall(" ".join(caption.lower().split()))


def learn_merges(word_counts: dict[bytes, int], size: int) -> list[bytes]:
    """The `size` tokens (fewer if no pair is left that occurs twice), in the order learned, the 256 bytes first.

    Among equals the smaller bytes win, so that the result depends on the counts alone. A pair is named by its joined bytes:
    boundaries only ever vanish, so bytes that stand alone between two of them are cut the same way in every word, and "ab"+"c"
    never meets "a"+"bc".
    """
    tokens = [bytes([byte]) for byte in range(256)]
    words = [[bytes([byte]) for byte in word] for word in word_counts]
    counts = list(word_counts.values())
    frequency = collections.Counter()         # candidate → how often it occurs now
    where = collections.defaultdict(set)      # candidate → words that hold it (or held it once)
    for index, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            frequency[left + right] += counts[index]
            where[left + right].add(index)
    heap = [(-n, candidate) for candidate, n in frequency.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < size:
        n, best = heapq.heappop(heap)
        if -n != frequency[best]:             # counts fell since it was pushed: put it back where it belongs
            if frequency[best] > 0:
                heapq.heappush(heap, (-frequency[best], best))
            continue
        if -n < 2:
            break
        tokens.append(best)
        changed = set()
        for index in where.pop(best):
            old, new = words[index], _merge(words[index], best)
            for left, right in zip(old, old[1:]):
                frequency[left + right] -= counts[index]
            for left, right in zip(new, new[1:]):
                frequency[left + right] += counts[index]
                where[left + right].add(index)
                changed.add(left + right)
            words[index] = new
        for candidate in changed:
            heapq.heappush(heap, (-frequency[candidate], candidate))
    return tokens


def _merge(word: list[bytes], best: bytes) -> list[bytes]:
    """The word with each pair of neighbours that spells `best` joined, from the left."""
    merged, i = [], 0
    while i < len(word):
        step = 2 if i + 1 < len(word) and word[i] + word[i + 1] == best else 1
        merged.append(b"".join(word[i:i + step]))
        i += step
    return merged


class Tokenizer:
    """Captions ↔ ids. `sot`, `eot` (the highest id), `vocab_size` = eot + 1."""

    def __init__(self, tokens: list[bytes]):
        """`tokens[id]` are the bytes of each token, most urgent merge first; sot and eot follow behind them."""
        assert len(set(tokens)) == len(tokens), "two tokens have the same bytes"
        assert {bytes([byte]) for byte in range(256)} <= set(tokens), "a byte is missing, so some texts could not be spelled"
        self.tokens = tokens
        self.sot, self.eot = len(tokens), len(tokens) + 1
        self.vocab_size = len(tokens) + 2
        # every piece ends in the one space that encode_batch puts there: no text falls between the matches
        self._encoding = tiktoken.Encoding(
            "clop", pat_str=r"\S+ ", mergeable_ranks={token: id for id, token in enumerate(tokens)},
            special_tokens={"<|startoftext|>": self.sot, "<|endoftext|>": self.eot})

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A tokenizer of at most `vocab_size` ids (258 or more), learned from the captions; the same for any order of them."""
        if vocab_size < 258:
            raise UserError(f"vocabulary size {vocab_size}: too small for the 256 bytes, start and end; take 258 or more")
        counts = collections.Counter(word for caption in captions for word in split_words(caption))
        # "replace": UTF-8 cannot hold half a surrogate pair, which broken JSON can; tiktoken replaces it likewise
        return cls(learn_merges({f"{word} ".encode("utf-8", "replace"): n for word, n in counts.items()}, vocab_size - 2))

    def encode(self, caption: str, length: int) -> list[int]:
        """sot … eot, at most `length` ids."""
        words = split_words(caption)[:length]  # each gives one id or more: the rest could never get in
        text = "".join(f"{word} " for word in words)
        return [self.sot, *self._encoding.encode_ordinary(text)[:length - 2], self.eot]

    def encode_batch(self, captions: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int64 [B, L], text_mask bool [B, L], True = real token), L = the longest of the batch, at most `length`."""
        assert length >= 2, f"{length=}: no room for start and end"
        rows = [self.encode(caption, length) for caption in captions]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])  # [B, L]
        text_mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]  # [B, L]
        return tokens, text_mask

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some ids, without start and end; pieces stay apart by a space ("don 't")."""
        spelled = b"".join(self.tokens[token] for token in tokens if token < self.sot)
        return spelled.decode("utf-8", "replace").rstrip(" ")

    def to_dict(self) -> dict:
        """JSON-able: {"tokens": [base64 of each token's bytes]}."""
        return {"tokens": [base64.b64encode(token).decode("ascii") for token in self.tokens]}

    @classmethod
    def from_dict(cls, saved: dict) -> "Tokenizer":
        return cls([base64.b64decode(token, validate=True) for token in saved["tokens"]])


def main():
    captions = ["a dog chases a cat", "two dogs chase the ball", "the cat is chasing dogs", "a ball bounces"]
    tokenizer = Tokenizer.train(captions, vocab_size=300)
    tokens, text_mask = tokenizer.encode_batch([" ".join(sys.argv[1:]) or "a dog chases the cats", "a cow"], length=16)
    print(f"{tokenizer.vocab_size} ids; learned:", *[token.decode().replace(" ", "_") for token in tokenizer.tokens[256:]])
    for row, mask in zip(tokens, text_mask):
        print(row.tolist(), mask.int().tolist(), repr(tokenizer.decode(row[mask].tolist())), sep="\n    ")


if __name__ == "__main__":
    run(main)
