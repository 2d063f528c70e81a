"""Can κ do with fewer columns than concepts? Its error, and that of the loss, for projections.

    python -m bench.knowledge_width --captions train.csv       # a minute

κ_ij is the dot product of two captions' concept vectors, up to 4,096 columns wide. A projection to
`width` columns makes the op (E + 4,096) / (E + width) times cheaper. Signs and hashing are random,
and fit nothing. PCA keeps the directions with the most κ in them; it is fitted on captions that are
not measured.
"""

import csv
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cli import UserError, parse_config, run
from knowledge import ConceptVocab, concept_vectors, extract_many

WIDTHS = (64, 128, 256)


@dataclass
class BenchConfig:
    """Error of κ by width."""

    captions: str  # csv with a column "caption"
    batch: int = 4096  # captions that are compared with each other
    fit: int = 16_000  # other captions, for the vocabulary and PCA
    seed: int = 0  # which captions, signs and columns


def read_vectors(config: BenchConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Concept vectors [fit, K] and [batch, K]."""
    with open(config.captions, newline="", encoding="utf-8") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    count = config.fit + config.batch
    if len(captions) < count:
        raise UserError(f"{config.captions}: {len(captions)} captions; needs {count}, or --fit N")
    captions = random.Random(config.seed).sample(captions, count)
    knowledge = extract_many(captions, workers=2, cache=None, progress=False)
    vocab = ConceptVocab.build(knowledge)
    held = torch.from_numpy(vocab.encode(knowledge).toarray())
    vectors = concept_vectors(held, torch.from_numpy(vocab.idf))
    return vectors[: config.fit], vectors[config.fit :]


def projections(fit: torch.Tensor, width: int, seed: int) -> dict[str, torch.Tensor]:
    """{name: matrix [K, width]}"""
    K, g = fit.shape[1], torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (K, width), generator=g) * 2.0 - 1
    hashed = torch.zeros(K, width)
    hashed[torch.arange(K), torch.randint(width, (K,), generator=g)] = signs[:, 0]
    # the small multiple of one keeps the solver from stumbling over equal eigenvalues
    spread = (fit.T @ fit).double() + 1e-9 * torch.eye(K, dtype=torch.float64)
    _, directions = torch.linalg.eigh(spread)
    return dict(signs=signs / width**0.5, hashing=hashed, PCA=directions[:, -width:].float())


def make_loss(vectors: torch.Tensor, seed: int):
    """A function κ [B, B] -> InfoNCE with β = 1 of random embeddings that half know each other."""
    g = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(len(vectors), 64, generator=g), dim=1)
    video = F.normalize(text + torch.randn(len(vectors), 64, generator=g) / 4, dim=1)
    target = torch.arange(len(vectors))

    def loss(kappa):
        logits = 14.3 * video @ text.T + kappa.clone().fill_diagonal_(0)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)).item() / 2

    return loss


def main():
    config = parse_config(BenchConfig)
    fit, vectors = read_vectors(config)
    kappa, loss = vectors @ vectors.T, make_loss(vectors, config.seed)
    others = ~torch.eye(len(kappa), dtype=torch.bool)
    close = (kappa > 0.5) & others
    effect = loss(kappa) - loss(torch.zeros_like(kappa))
    print(f"{len(vectors)} captions, {vectors.shape[1]} concepts;")
    print(f"κ > 0 for {(kappa[others] > 0).float().mean():.0%} of pairs, > 0.5 for", end=" ")
    print(f"{close.float().mean():.3%}; κ moves the loss by {effect:.4f}\n")

    print("| width | projection | rms error of κ | where κ > 0.5 | error of the loss / its move |")
    print("|---" * 5 + "|")
    for width in WIDTHS:
        for name, matrix in projections(fit, width, config.seed).items():
            narrow = vectors @ matrix
            error = narrow @ narrow.T - kappa
            rms, rms_close = (error[mask].square().mean().sqrt() for mask in (others, close))
            share = abs(loss(kappa + error) - loss(kappa)) / effect
            print(f"| {width} | {name} | {rms:.4f} | {rms_close:.3f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    run(main)
