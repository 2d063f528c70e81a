"""Pictures of the joint space: what each part of CLOP changes in it, from checkpoints of variants.

    python -m bench.latent                                            # after bench.ablation: seed 0
    python -m bench.latent base=runs/a all=runs/b --data my/folder    # with train.csv and val.csv

Four pictures in --out, each with its finding, computed, in its title:

latent-similarity.png   histograms of the cosine of positives, of hard negatives (pairs of the
                        gallery that share
                        knowledge, κ ≥ 0.3, but are not false negatives) and of the others. What
                        counts is how many hard negatives score above the positive of their caption.
latent-geometry.png     alignment  mean ‖v_i − t_i‖² of the positives: how near a video and its
                                   caption are;
                        uniformity log mean exp(−2‖x − y‖²) over pairs: how evenly a side fills the
                        sphere; for both, smaller is better (Wang & Isola 2020, arXiv 2005.10242).
                        Beside it the *gradient share*: InfoNCE pushes negative j away from i with
                        the force p_ij, its softmax weight; how much of the whole push do hard
                        negatives get, in random and in knowledge-guided batches?
latent-map.png          the two directions of largest variance (SVD of the centred embeddings) of
                        the gallery's videos,
                        coloured by the commonest verbs or nouns of their captions: a cluster is a
                        concept that the space knows.
latent-batches.png      κ and the similarity matrix of a random and of a guided batch of training
                        captions.

The gallery is --split; gradient share and batches are of training captions. Nothing is trained.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tyro.conf import Positional

from cli import UserError, parse_config, run
from data import KnowledgeBatchSampler, find_overlapping, keep_decodable, open_cache
from datasets.published import load_split
from datasets.split import Split
from eval import embed_texts, embed_videos
from knowledge import Knowledge, extract_many, meaning_ids, unit_rows
from training.checkpoint import Checkpoint, load_checkpoint

HARD = 0.3  # κ from which on a negative counts as hard
DEFAULT = tuple(f"{v}=runs/ablation/{v}-0" for v in ("base", "skp", "kcl", "all"))


@dataclass
class LatentConfig:
    """Pictures of the joint space of several checkpoints."""

    checkpoints: Positional[tuple[str, ...]] = DEFAULT  # NAME=RUN …
    data: str = "cache/toy"  # folder with train.csv and val.csv or test.csv
    split: Literal["val", "test"] = "val"  # the gallery
    concepts: Literal["noun", "verb"] = "verb"  # what colours the map
    batch_size: int = 128  # of the two batches that are shown
    group_size: int = 4  # … of samples that share knowledge, in the guided one
    out: str = "docs"  # folder for the pictures
    cache: str = "cache"  # decoded frames, extracted knowledge


def main():
    config = parse_config(LatentConfig)
    spaces = [load_space(word, config) for word in config.checkpoints]
    Path(config.out).mkdir(parents=True, exist_ok=True)
    draw_similarity(spaces, Path(config.out) / "latent-similarity.png")
    draw_geometry(spaces, Path(config.out) / "latent-geometry.png")
    draw_map(spaces, Path(config.out) / "latent-map.png", config.concepts)
    draw_batches(spaces[0], Path(config.out) / "latent-batches.png")


# ---- what is measured ----------------------------------------------------------------------------


def alignment(video_emb: np.ndarray, text_emb: np.ndarray) -> float:
    """Mean squared distance of the positives, in [0, 4]: unit rows [n, E], [n, E], row i of one
    belongs to row i.
    """
    return float(((video_emb - text_emb) ** 2).sum(axis=1).mean())


def uniformity(emb: np.ndarray) -> float:
    """log mean exp(−2‖x − y‖²) over all pairs of different rows of emb [n, E] (unit norm); 0 if all
    are equal.
    """
    distance = 2 - 2 * emb @ emb.T  # squared, [n, n]
    return float(np.log(np.exp(-2 * distance[~np.eye(len(emb), dtype=bool)]).mean()))


def negative_masks(
    kappa: np.ndarray, video: np.ndarray, meaning: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(negative, hard), bool [n, n]: pairs of neither one video nor one meaning, and those of them
    with κ ≥ HARD.
    """
    negative = (video[:, None] != video) & (meaning[:, None] != meaning)
    return negative, negative & (kappa >= HARD)


def gradient_share(logits: np.ndarray, negative: np.ndarray, hard: np.ndarray) -> float:
    """How much of InfoNCE's push on the negatives goes to the hard ones, in [0, 1], over rows and
    columns alike.

    logits [n, n] with positives on the diagonal. The derivative of the loss by a_ij is the softmax
    weight p_ij.
    """
    push, total = 0.0, 0.0
    for a in (logits, logits.T):
        weight = np.exp(a - a.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        push, total = push + weight[hard].sum(), total + weight[negative].sum()
        negative, hard = negative.T, hard.T
    return float(push / total) if total else 0.0


def violations(sim: np.ndarray, hard: np.ndarray) -> float:
    """Share of hard negatives [n, n] that score above the positive (the diagonal) of their row."""
    above = sim > np.diag(sim)[:, None]
    return float(above[hard].mean()) if hard.any() else 0.0


def principal_plane(emb: np.ndarray) -> np.ndarray:
    """[n, E] → [n, 2]: coordinates along the two directions of largest variance; signs fixed, so
    that it repeats.
    """
    centred = emb - emb.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    plane = directions[:2]
    plane = plane * np.sign(plane[np.arange(2), np.abs(plane).argmax(axis=1)])[:, None]
    return centred @ plane.T


# ---- where it comes from -------------------------------------------------------------------------


@dataclass
class Batch:
    """Captions with their videos, as one model sees them: all square, row = caption, column =
    video.
    """

    captions: list[str]
    knowledge: Knowledge
    video_emb: np.ndarray  # [n, E]
    text_emb: np.ndarray  # [n, E]
    kappa: np.ndarray  # [n, n]
    negative: np.ndarray  # bool [n, n]
    hard: np.ndarray  # bool [n, n]

    @property
    def sim(self) -> np.ndarray:
        return self.text_emb @ self.video_emb.T


@dataclass
class Space:
    """One checkpoint: the gallery, and a random and a guided batch of training captions."""

    name: str
    scale: float  # exp(logit_scale)
    gallery: Batch
    random: Batch
    guided: Batch


def load_space(word: str, config: LatentConfig) -> Space:
    """The space of NAME=RUN."""
    name, _, path = word.partition("=")
    if not path:
        raise UserError(f"{word}: expected NAME=CHECKPOINT, such as base=runs/ablation/base-0")
    checkpoint = load_checkpoint(path)
    print(f"{name}: {checkpoint.path}")
    gallery = load_split("csv", Path(config.data), config.split)
    _, first = np.unique(gallery.video_of_caption, return_index=True)  # one caption a video
    train = load_split("csv", Path(config.data), "train")
    knowledge = extract_many(train.captions, cache=Path(config.cache) / "knowledge")
    vocab = checkpoint.concept_vocab
    held = vocab.encode(knowledge)
    sampler = KnowledgeBatchSampler(
        held,
        train.video_of_caption,
        batch_size=config.batch_size,
        guided_share=1.0,
        group_size=config.group_size,
    )
    find = functools.partial(find_overlapping, unit_rows(held, vocab.word_idf))
    batches = []
    for hardest in (None, find):
        plan = sampler.plan(epoch=0, num_batches=1, find_hardest=hardest)
        batches.append(embed_batch(checkpoint, train, plan, config))
    return Space(
        name,
        checkpoint.model.logit_scale.exp().item(),
        embed_batch(checkpoint, gallery, first, config),
        *batches,
    )


def embed_batch(
    checkpoint: Checkpoint, split: Split, chosen: np.ndarray, config: LatentConfig
) -> Batch:
    """These captions of a split and their videos."""
    captions, video = [split.captions[i] for i in chosen], split.video_of_caption[chosen]
    paths = [split.video_paths[i] for i in video]
    vocab = checkpoint.concept_vocab
    cache = open_cache(Path(config.cache) / "frames", checkpoint.model.config)
    keep_decodable(
        Split(list(dict.fromkeys(paths)), [], np.zeros(0, np.int64)),
        cache,
        max_broken=0,
        progress=False,
    )
    knowledge = extract_many(captions, progress=False)
    unit = unit_rows(vocab.encode(knowledge), vocab.idf)
    kappa = (unit @ unit.T).toarray()
    negative, hard = negative_masks(kappa, video, meaning_ids(captions, knowledge))
    video_emb, text_emb = (
        x.double().numpy()
        for x in (
            embed_videos(checkpoint.model, cache, paths),
            embed_texts(checkpoint.model, checkpoint.tokenizer, captions),
        )
    )
    return Batch(captions, knowledge, video_emb, text_emb, kappa, negative, hard)


# ---- pictures ------------------------------------------------------------------------------------


def subplots(rows: int, columns: int, width: float, height: float):
    """(pyplot, figure, axes [rows, columns]) without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return plt, figure, axes


def save(plt, figure, path: Path):
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"{path}: {path.stat().st_size // 1000} kB")


def draw_similarity(spaces: list[Space], path: Path):
    plt, figure, axes = subplots(1, len(spaces), 3.6 * len(spaces), 3.4)
    bins = np.linspace(min(space.gallery.sim.min() for space in spaces), 1, 50)
    shares = []
    for space, axis in zip(spaces, axes[0]):
        batch, sim = space.gallery, space.gallery.sim
        shares.append(violations(sim, batch.hard))
        for name, values, color in (
            ("positives", np.diag(sim), "C2"),
            ("hard negatives", sim[batch.hard], "C3"),
            ("other negatives", sim[batch.negative & ~batch.hard], "C7"),
        ):
            if len(values):
                axis.hist(
                    values,
                    bins,
                    density=True,
                    alpha=0.5,
                    color=color,
                    label=f"{name}, mean {values.mean():.2f}",
                )
        axis.set(
            title=(
                f"{space.name}: {100 * shares[-1]:.1f} % of hard negatives\nscore above their "
                "positive"
            ),
            xlabel="cosine",
            yticks=[],
        )
        axis.legend(frameon=False, fontsize=8)
    best = spaces[int(np.argmin(shares))].name
    figure.suptitle(
        f"Fewest hard negatives (κ ≥ {HARD}) beat their positive in: {best} "
        f"({100 * min(shares):.1f} %, "
        f"{spaces[0].name} {100 * shares[0]:.1f} %)"
    )
    save(plt, figure, path)


def draw_geometry(spaces: list[Space], path: Path):
    plt, figure, (axes,) = subplots(1, 2, 10, 4)
    points = []
    for number, space in enumerate(spaces):
        batch = space.gallery
        near = alignment(batch.video_emb, batch.text_emb)
        spread = [uniformity(batch.video_emb), uniformity(batch.text_emb)]
        points.append((near, np.mean(spread)))
        axes[0].plot([near, near], spread, color=f"C{number}", linewidth=1)
        axes[0].plot(near, spread[0], "o", color=f"C{number}", label=space.name)
        axes[0].plot(near, spread[1], "^", color=f"C{number}")
    nearest, widest = (spaces[int(np.argmin(column))].name for column in np.array(points).T)
    axes[0].set(
        title=f"Nearest positives: {nearest}; most uniform: {widest}",
        xlabel="alignment (smaller: nearer)",
        ylabel="uniformity (smaller: more even)\n● videos   ▲ captions",
    )
    axes[0].legend(frameon=False, fontsize=8)

    shares = np.array(
        [
            [
                gradient_share(space.scale * batch.sim, batch.negative, batch.hard)
                for batch in (space.random, space.guided)
            ]
            for space in spaces
        ]
    )
    counts = [
        batch.hard.sum() / batch.negative.sum() for batch in (spaces[0].random, spaces[0].guided)
    ]
    for number, (name, color) in enumerate((("random batch", "C7"), ("guided batch", "C3"))):
        axes[1].bar(
            np.arange(len(spaces)) + 0.4 * number - 0.2,
            100 * shares[:, number],
            0.38,
            color=color,
            label=f"{name}: {100 * counts[number]:.1f} % of its negatives are hard",
        )
    axes[1].set_xticks(range(len(spaces)), [space.name for space in spaces])
    axes[1].set(
        ylabel="% of the push",
        ylim=(0, 130),
        yticks=range(0, 101, 20),
        title=f"Hard negatives get {100 * shares[:, 0].mean():.0f} % of the push in random,\n"
        f"{100 * shares[:, 1].mean():.0f} % in guided batches (mean of the models)",
    )
    axes[1].legend(frameon=False, fontsize=8)
    save(plt, figure, path)


def draw_map(spaces: list[Space], path: Path, granularity: str, count: int = 8):
    plt, figure, axes = subplots(1, len(spaces), 3.6 * len(spaces), 4)
    knowledge = spaces[0].gallery.knowledge
    of_caption = [
        {name for name in knowledge.concepts_of(i) if name.startswith(f"{granularity}:")}
        for i in range(len(knowledge))
    ]
    names = [name for names in of_caption for name in sorted(names)]
    common = sorted(set(names), key=lambda name: (-names.count(name), name))[:count]
    gains = []
    for space, axis in zip(spaces, axes[0]):
        video_emb = space.gallery.video_emb
        sim, plane = video_emb @ video_emb.T, principal_plane(video_emb)
        other = ~np.eye(len(sim), dtype=bool)
        within = []
        axis.scatter(*plane.T, s=6, color="#ddd")
        for number, concept in enumerate(common):
            has = np.array([concept in names for names in of_caption])
            within.append(sim[np.outer(has, has) & other].mean() if has.sum() > 1 else 0.0)
            axis.scatter(
                *plane[has].T,
                s=9,
                color=plt.get_cmap("tab10")(number),
                label=concept.partition(":")[2],
            )
        gains.append(np.mean(within) - sim[other].mean())
        axis.set(
            title=f"{space.name}: cosine of videos that share\none {np.mean(within):.2f}, "
            f"of any two {sim[other].mean():.2f}",
            xticks=[],
            yticks=[],
        )
    axes[0, 0].legend(frameon=False, fontsize=7, markerscale=2, ncols=2)
    figure.suptitle(
        f"Videos of the same {granularity} lie closest together, against any two, in: "
        f"{spaces[int(np.argmax(gains))].name}"
    )
    save(plt, figure, path)


def draw_batches(space: Space, path: Path):
    plt, figure, axes = subplots(2, 2, 8, 7.4)
    for column, name, batch in zip(
        axes.T, ("random batch", "guided batch"), (space.random, space.guided)
    ):
        others = ~np.eye(len(batch.kappa), dtype=bool)
        hardest = np.where(batch.negative, batch.kappa, 0).max(axis=1).mean()
        column[0].imshow(batch.kappa, vmin=0, vmax=1, cmap="magma", interpolation="nearest")
        column[0].set(
            title=f"κ, {name}: each caption's nearest\nnegative has κ = {hardest:.2f} in the mean"
        )
        column[1].imshow(batch.sim, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        hard = batch.sim[batch.hard].mean() if batch.hard.any() else float("nan")
        column[1].set(
            title=f"similarity by {space.name}, {name}:\n"
            f"negatives {batch.sim[others].mean():+.2f}, hard ones {hard:+.2f}"
        )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], xlabel="videos", ylabel="captions")
    save(plt, figure, path)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(main)
