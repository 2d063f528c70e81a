"""Caption -> integer tokens: byte-pair encoding, learned from the training captions.

A vocabulary of whole words cannot spell a new word; one of letters makes long sequences. Byte-pair
encoding (BPE) starts from the 256 bytes, so that any text can be written. Again and again it adds
the pair of neighbours that is most frequent in the training captions as a new token, until the
vocabulary is full ("_" is the space behind a word):

    d·o·g·_  c·h·a·s·e·s·_   ->  do·g·_  c·ha·s·es·_   ->  …  ->  dog_  chases_

A caption is cleaned, then split into words, digits and punctuation. Each piece gets one space
behind it. So "dog_" as a word and "dog" as the beginning of "dogma" are different tokens, and no
token crosses a word. This is CLIP's scheme to the letter (its mark `</w>` is our space), after
Sennrich et al., https://arxiv.org/abs/1508.07909. CLIP's own merges are just another vocabulary:

    Tokenizer.train(captions, vocab_size)      learns one
    Tokenizer.from_clip(folder, vocab_size)    reads CLIP's: the same ids as its own code

    encode_batch(["a dog runs"], length=8) ->  tokens     [[sot, a_, dog_, runs_, eot]]   [B, L]
                                               text_mask  [[  1,  1,   1,     1,   1]]    [B, L]

The start and end tokens, sot and eot, are the two highest ids. L is the longest caption of the
batch, at most `length`; a longer caption loses its last words, never its eot. Padding is id 0 and
False in `text_mask`. Special tokens cannot be written by a caption: "<|endoftext|>" is spelled out.
(OpenAI's code and transformers let it end the text right there: the one difference.)

The learner is ours and takes seconds. Encoding is tiktoken's Rust, given our ranks, so nothing is
downloaded; the vocabulary travels in the checkpoint.
"""

import base64
import collections
import gzip
import heapq
import html
import itertools
from collections.abc import Iterable
from pathlib import Path

import ftfy
import regex
import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence

from cli import UserError

# CLIP's own: English clitics, runs of letters, single digits, runs of anything else
WORD_PATTERN = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
PAD = 0
# Characters of a caption that are read. The time to mend a text may grow with the square of its
# length, and Python refuses to read a number of more than 4,300 digits ("&#999…").
LONGEST = 4000
# where CLIP's merges are found
CLIP_FILES = ("merges.txt", "bpe_simple_vocab_16e6.txt.gz")


def clean(caption: str) -> str:
    """CLIP's clean-up: "CAFÃ‰ &amp;amp;  bar" -> "café & bar"."""
    is_plain = caption.isascii() and caption.isprintable() and "&" not in caption
    if not is_plain:
        caption = ftfy.fix_text(caption[:LONGEST])
        caption = html.unescape(html.unescape(caption))
    return " ".join(caption.split()).lower()


def split_words(caption: str) -> list[str]:
    """The cleaned pieces that BPE works on: "Two dogs' toys" -> two · dogs · ' · toys."""
    return WORD_PATTERN.findall(clean(caption))


# ---- learning ------------------------------------------------------------------------------------


def learn_merges(word_counts: dict[bytes, int], size: int) -> list[bytes]:
    """The `size` tokens (fewer if no pair is left that occurs twice), the 256 bytes first.

    Among equals the smaller bytes win, so that the result depends on the counts alone. A pair is
    named by its joined bytes: boundaries only ever vanish, so bytes that stand alone between two of
    them are cut the same way in every word, and "ab"+"c" never meets "a"+"bc".
    """
    tokens = [bytes([byte]) for byte in range(256)]
    counts = list(word_counts.values())
    words = []
    for word in word_counts:
        words.append([tokens[byte] for byte in word])

    frequency = collections.Counter()  # pair -> how often it occurs now
    where = collections.defaultdict(set)  # pair -> words that hold it, or held it once

    def count(index: int, sign: int) -> list[bytes]:
        """Add the pairs of a word to the counts, or take them away. Returns them."""
        pairs = [left + right for left, right in itertools.pairwise(words[index])]
        for pair in pairs:
            frequency[pair] += sign * counts[index]
            where[pair].add(index)
        return pairs

    for index in range(len(words)):
        count(index, 1)

    heap = [(-n, pair) for pair, n in frequency.items()]
    heapq.heapify(heap)

    while heap and len(tokens) < size:
        n, best = heapq.heappop(heap)
        if -n != frequency[best]:  # counts fell since it was pushed: put it back where it belongs
            if frequency[best] > 0:
                heapq.heappush(heap, (-frequency[best], best))
            continue
        if -n < 2:
            break
        tokens.append(best)

        # only the words that hold the pair change, and only their pairs
        changed = set()
        for index in where.pop(best):
            count(index, -1)
            words[index] = merge(words[index], best)
            changed.update(count(index, 1))
        for pair in changed:
            heapq.heappush(heap, (-frequency[pair], pair))

    return tokens


def merge(word: list[bytes], best: bytes) -> list[bytes]:
    """The word with each pair of neighbours that spells `best` joined, from the left."""
    merged = []
    for token in word:
        if merged and merged[-1] + token == best:
            merged[-1] = best
        else:
            merged.append(token)
    return merged


# ---- the tokenizer -------------------------------------------------------------------------------


class Tokenizer:
    """Captions <-> ids. `sot`, `eot` (the highest id), `vocab_size` = eot + 1."""

    def __init__(self, tokens: list[bytes]):
        """tokens[id] are the bytes of each token, the first to merge first; sot and eot follow."""
        all_bytes = {bytes([byte]) for byte in range(256)}
        assert len(set(tokens)) == len(tokens), "two tokens have the same bytes"
        assert all_bytes <= set(tokens), "a byte is missing: some texts cannot be spelled"
        self.tokens = tokens
        self.sot, self.eot = len(tokens), len(tokens) + 1
        self.vocab_size = len(tokens) + 2
        self.encoding = tiktoken.Encoding(
            "clop",
            pat_str=r"\S+ ",  # every piece ends in the one space that `encode` puts there
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={"<|startoftext|>": self.sot, "<|endoftext|>": self.eot},
        )

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A tokenizer of at most `vocab_size` ids (258 or more), learned from the captions."""
        if vocab_size < 258:
            raise UserError(f"vocabulary size {vocab_size}: the 256 bytes and 2 marks need 258")
        counts = collections.Counter()
        for caption in captions:
            counts.update(split_words(caption))
        # "replace": UTF-8 cannot hold half of a character, which broken JSON can
        spelled = {f"{word} ".encode("utf-8", "replace"): n for word, n in counts.items()}
        return cls(learn_merges(spelled, vocab_size - 2))

    @classmethod
    def from_clip(cls, folder: str | Path, vocab_size: int) -> "Tokenizer":
        """CLIP's own, from the first of CLIP_FILES that lies in `folder`.

        CLIP writes bytes as letters (those that print as themselves, the others as letters from
        code 256 on) and numbers them in that order: 256 bytes, the same with the mark `</w>`, then
        a token per merge. OpenAI's file holds more merges than were used: the first
        `vocab_size` − 514 count. Raises UserError: no such file, a damaged one, or one of another
        vocabulary than the weights'.
        """
        paths = [Path(folder) / name for name in CLIP_FILES if (Path(folder) / name).is_file()]
        if not paths:
            raise UserError(
                f"{folder}: CLIP's vocabulary is not there; put its {' or '.join(CLIP_FILES)} "
                "beside the weights"
            )

        printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        byte_of = {chr(byte): byte for byte in printable}
        byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}

        path = paths[0]
        try:
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            lines = data.decode("utf-8").splitlines()[1 : vocab_size - 513]  # the first: a version
            names = [*byte_of, *(f"{letter}</w>" for letter in byte_of)]
            names += [left + right for left, right in map(str.split, lines)]
            tokens = []
            for name in names:
                token = bytes(byte_of[letter] for letter in name.removesuffix("</w>"))
                tokens.append(token + b" " if name.endswith("</w>") else token)
        except (OSError, EOFError, ValueError, KeyError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path}: not a file of CLIP's merges ({what}); fetch it again"
            ) from error

        if len(set(tokens)) != vocab_size - 2:
            raise UserError(
                f"{path}: gives {len(set(tokens)) + 2} tokens, the weights have {vocab_size}: it "
                "belongs to another model; take the one from the model's own page"
            )
        return cls(tokens)

    def encode(self, caption: str, length: int) -> list[int]:
        """sot … eot, at most `length` ids."""
        words = split_words(caption)[:length]  # each gives an id or more: the rest cannot get in
        text = "".join(f"{word} " for word in words)
        ids = self.encoding.encode_ordinary(text)
        return [self.sot, *ids[: length - 2], self.eot]

    def encode_batch(self, captions: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int64 [B, L], text_mask bool [B, L]: True = real token), L at most `length`."""
        assert length >= 2, f"{length=}: no room for start and end"
        rows = [torch.tensor(self.encode(caption, length)) for caption in captions]
        tokens = pad_sequence(rows, batch_first=True, padding_value=PAD)
        lengths = torch.tensor(list(map(len, rows)))
        return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]

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
