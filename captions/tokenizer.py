"""Caption → integer tokens: byte-pair encoding, learned from the training captions.

A vocabulary of whole words cannot spell a new word; one of letters makes long sequences. Byte-pair encoding (BPE)
starts from the 256 bytes, so that any text can be written, and adds the pair of neighbours that is most frequent in
the training captions as a new token, again and again, until the vocabulary is full:

    d·o·g·_  c·h·a·s·e·s·_   →  do·g·_  c·ha·s·es·_   →  …  →  dog_  chases_        "_": the space behind a word

Encoding replays the merges in the order in which they were learned. A caption is cleaned (broken encodings mended, HTML
entities undone, lower case, white space made single), then split into words, numbers' digits and punctuation; each
piece gets one space behind it, so that "dog_" as a word and "dog" as the beginning of "dogma" are different tokens, and
no token crosses a word. This is CLIP's scheme to the letter (its mark `</w>` is our trailing space), after Sennrich et
al., https://arxiv.org/abs/1508.07909. So CLIP's own merges, which come with its weights, are just another vocabulary:

    Tokenizer.train(captions, vocab_size)      learns one
    Tokenizer.from_clip(folder, vocab_size)    reads CLIP's: the same ids as its own code, for any text but one (below)

    encode_batch(["a dog runs"], length=8) → tokens    [[sot, a_, dog_, runs_, eot]]   int64 [B, L]
                                             text_mask [[  1,  1,   1,     1,   1]]    bool  [B, L], True = real token

The start and end tokens, sot and eot, are the two highest ids, eot the highest, because CLIP finds the end of a text
by argmax. L is the longest caption of the batch, at most `length`: short batches cost less; a longer caption loses
its last words, never its eot. Padding is id 0 and False in `text_mask`.

The learner below is ours and takes seconds: it works on *distinct* words with their counts, and a merge touches only
the words that hold the pair. Encoding is tiktoken's Rust, given our ranks, so that nothing is downloaded; `to_dict`
puts the vocabulary into the checkpoint, and no other file is needed to evaluate. Special tokens cannot be written by
a caption: "<|endoftext|>" in a text is spelled out like any other word. (OpenAI's code and transformers let it end the
text right there: the one difference.)

    python tokenizer.py "a dog chases the cats"
"""

import base64
import collections
import gzip
import heapq
import html
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import ftfy
import regex
import tiktoken
import torch

from cli import UserError, run

# CLIP's own: English clitics, runs of letters, single digits, runs of anything else that is not white space
WORD_PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
PAD = 0
CLIP_FILES = ("merges.txt", "tokenizer.json", "bpe_simple_vocab_16e6.txt.gz")  # where CLIP's merges are found


def clean(caption: str) -> str:
    """CLIP's clean-up: "CAFÃ‰ &amp;amp;  bar" → "café & bar"."""
    if not caption.isascii() or not caption.isprintable() or "&" in caption:  # else neither would change anything
        caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(caption.split()).lower()


def split_words(caption: str) -> list[str]:
    """The pieces that BPE works on, cleaned, without white space: "Two dogs' toys" → two · dogs · ' · toys."""
    return WORD_PATTERN.findall(clean(caption))


def learn_merges(word_counts: dict[bytes, int], size: int) -> list[bytes]:
    """The `size` tokens (fewer if no pair is left that occurs twice), in the order learned, the 256 bytes first.

    Among equals the smaller bytes win, so that the result depends on the counts alone. A pair is named by its joined
    bytes: boundaries only ever vanish, so bytes that stand alone between two of them are cut the same way in every
    word, and "ab"+"c" never meets "a"+"bc".
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


def read_clip_tokens(folder: str | Path, vocab_size: int) -> list[bytes]:
    """The bytes of CLIP's tokens, by id, without start and end, from the first of CLIP_FILES that lies in `folder`.

    CLIP writes bytes as letters (those that print as themselves, the others as letters from code 256 on) and numbers
    them in that order: 256 bytes, the same 256 with the mark `</w>`, then a token for each merge. The file of 262,145
    lines that OpenAI published holds more merges than were used: the first `vocab_size` − 514 count.
    Raises UserError: no such file, a damaged one, or one of another vocabulary than the weights'.
    """
    path = next((Path(folder) / name for name in CLIP_FILES if (Path(folder) / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: CLIP's vocabulary is not there; put its merges.txt, tokenizer.json or "
                        "bpe_simple_vocab_16e6.txt.gz beside the weights")
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    try:
        ids = None  # {token: id}, where a file states them
        if path.suffix == ".json":
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            ids, merges = model["vocab"], model["merges"]  # a merge is "a b" or ["a", "b"], by the version of the file
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        else:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            merges = [line.split() for line in data.decode("utf-8").splitlines()[1:] if line]  # first line: version
            if (path.parent / "vocab.json").is_file():
                ids = json.loads((path.parent / "vocab.json").read_text(encoding="utf-8"))
        names = [*byte_of, *(f"{letter}</w>" for letter in byte_of)]
        names += [left + right for left, right in merges[:vocab_size - 514]]
        tokens = [bytes(byte_of[letter] for letter in name.removesuffix("</w>")) + b" " * name.endswith("</w>")
                  for name in names]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of CLIP's merges ({type(error).__name__}: {error}); fetch it again"
                        ) from error
    if len(set(tokens)) != vocab_size - 2:
        raise UserError(f"{path}: gives {len(set(tokens)) + 2} tokens, the weights have {vocab_size}: "
                        "it belongs to another model; take the one from the model's own page")
    if ids is not None and any(ids.get(name) != id for id, name in enumerate(names)):
        raise UserError(f"{path}: its tokens are not numbered as CLIP's are; take the file from the model's own page")
    return tokens


class Tokenizer:
    """Captions ↔ ids. `sot`, `eot` (the highest id), `vocab_size` = eot + 1."""

    def __init__(self, tokens: list[bytes]):
        """`tokens[id]` are the bytes of each token, most urgent merge first; sot and eot follow behind them."""
        assert len(set(tokens)) == len(tokens), "two tokens have the same bytes"
        assert {bytes([byte]) for byte in range(256)} <= set(tokens), "a byte is missing: some texts cannot be spelled"
        self.tokens = tokens
        self.sot, self.eot = len(tokens), len(tokens) + 1
        self.vocab_size = len(tokens) + 2
        # every piece ends in the one space that encode_batch puts there: no text falls between the matches
        self._encoding = tiktoken.Encoding(
            "clop", pat_str=r"\S+ ", mergeable_ranks={token: id for id, token in enumerate(tokens)},
            special_tokens={"<|startoftext|>": self.sot, "<|endoftext|>": self.eot})

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A tokenizer of at most `vocab_size` ids (258 or more), learned from the captions, in whatever order."""
        if vocab_size < 258:
            raise UserError(f"vocabulary size {vocab_size}: too small for 256 bytes, start and end; take 258 or more")
        counts = collections.Counter(word for caption in captions for word in split_words(caption))
        # "replace": UTF-8 cannot hold half a surrogate pair, which broken JSON can; tiktoken replaces it likewise
        spelled = {f"{word} ".encode("utf-8", "replace"): n for word, n in counts.items()}
        return cls(learn_merges(spelled, vocab_size - 2))

    @classmethod
    def from_clip(cls, folder: str | Path, vocab_size: int) -> "Tokenizer":
        """CLIP's own tokenizer, from the file of merges in the folder of its weights; see `read_clip_tokens`."""
        return cls(read_clip_tokens(folder, vocab_size))

    def encode(self, caption: str, length: int) -> list[int]:
        """sot … eot, at most `length` ids."""
        words = split_words(caption)[:length]  # each gives one id or more: the rest could never get in
        text = "".join(f"{word} " for word in words)
        return [self.sot, *self._encoding.encode_ordinary(text)[:length - 2], self.eot]

    def encode_batch(self, captions: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int64 [B, L], text_mask bool [B, L]: True = real token), L = the longest here, at most `length`."""
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
    learned = [token.decode().replace(" ", "_") for token in tokenizer.tokens[256:]]
    print(f"{tokenizer.vocab_size} ids; learned:", *learned)
    for row, mask in zip(tokens, text_mask):
        print(row.tolist(), mask.int().tolist(), repr(tokenizer.decode(row[mask].tolist())), sep="\n    ")


if __name__ == "__main__":
    run(main)
