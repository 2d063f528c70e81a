"""What CLOP's parts buy on real clips with real captions: its losses on frozen features.

    python -m bench.real_features                # three variants on the validation file: once
    python -m bench.real_features --towers       # the same with small towers trained from scratch
    python -m bench.real_features --gallery tune --seeds 1 --variants "base all:beta=2" \\
        --results tuning.jsonl                   # before that: choose settings
    python -m bench.real_features --train mine.csv --val mine_val.csv --results mine.jsonl
    python -m bench.real_features --table        # only the tables, from the records

The frames go through a frozen EfficientNet-Lite0 and the captions through a frozen MiniLM, once
(frozen_features.py). What is trained is what CLOP adds: one linear map per side into the joint
space, the logit scale, the concept head. All else is used as it is: extract_many on the captions,
ConceptVocab, KnowledgeBatchSampler, clop_loss, eval's ranks. So the question is a small one, and
answered on real data: given the same features, do SKP and KCL make a better joint space than
InfoNCE alone?

`--towers` asks it of towers that have something to learn. A small transformer reads the features of
the frames, and model.py's text tower reads the tokens: neither MiniLM nor anything else has told it
what a word means.

`--gallery tune` holds out 300 of the training videos (always the same), trains on the rest and
measures on these: all settings are chosen there. `--gallery val` trains on all training videos and
measures on --val, which is touched once.

Besides ranks there is a multiple choice: which of five captions is this video's? The wrong four are
captions of other videos of the gallery: those of the highest overlap κ with the right one that are
not false negatives.

MSR-VTT has twenty captions per video. Captions of the same video, or that say the same, meet in a
batch as negatives. "base" leaves them in, as plain InfoNCE does (what everybody trains); "masks"
alone shows what leaving them out buys.

With ../shared/msrvtt_mini: 3,151 training clips, 63,020 captions, "244-clip validation gallery";
sampled frames, and half of the clips with two of them: not comparable with published numbers.
"""

import functools
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench.ablation import (
    BASE,
    HEADINGS,
    MASKS,
    PAGE,
    SKP,
    TEXTS,
    WEIGHTING,
    order_variants,
    variant_fields,
)
from bench.frozen_features import text_features, video_features
from bench.paired import append_run, group_runs, markdown_tables, read_runs, replace_section
from captions.tokenizer import Tokenizer
from cli import UserError, parse_config, run
from data import KnowledgeBatchSampler
from datasets.published import load_split
from eval import (
    machine_facts,
    multiple_choice_points,
    retrieval_ranks,
    summarize,
)
from knowledge import (
    ConceptVocab,
    Knowledge,
    concept_vectors,
    extract_many,
    meaning_ids,
    unit_rows,
)
from losses import LossConfig, clop_loss
from model import Block, ModelConfig, TextEncoder, init_tower

HELD_OUT = 300  # training videos that make the tuning gallery

# of the towers from scratch
WIDTH, HEADS, VIDEO_LAYERS, TEXT_LAYERS, TEXT_LENGTH, VOCAB_SIZE = 128, 4, 2, 2, 20, 4096

# Chosen on the tuning gallery (docs/LOG.md), where little made a difference.
SAMPLING = dict(guided_share=0.25)
MINING = dict(hard_k=16, hard_weight=0.5) | MASKS
VARIANTS = {
    "base": BASE,
    "skp": BASE | SKP,
    "sampling": BASE | SAMPLING,
    "masks": BASE | MASKS,
    "weighting": BASE | WEIGHTING,
    "mining": BASE | MINING,
    "kcl": BASE | SAMPLING | TEXTS | MASKS,
    "all": BASE | SKP | SAMPLING | TEXTS | MASKS,
}


@dataclass
class FeatureConfig:
    """CLOP's heads and losses on frozen features of real videos and captions."""

    train: str = "../shared/msrvtt_mini/train.csv"  # csv or jsonl with columns video, caption
    val: str = "../shared/msrvtt_mini/val.csv"  # the same, for --gallery val
    gallery: Literal["tune", "val"] = "val"  # tune: 300 training videos, held out
    towers: bool = False  # small transformers from scratch instead of linear maps
    variants: str = "base skp all"  # of VARIANTS, or changed: NAME:field=value,…
    seeds: int = 5  # seeds 0 … n − 1
    epochs: int = 4  # of all captions
    batch_size: int = 256  # pairs
    lr: float = 1e-3  # peak learning rate; cosine to zero
    weight_decay: float = 0.1  # of matrices
    dropout: float = 0.5  # of the features
    embed_dim: int = 256  # E
    cache: str = "cache"  # features, extracted knowledge
    results: str = "bench/results/real_features.jsonl"  # a line for each run
    table: bool = False  # train nothing: print the tables, refresh docs/


def main():
    config = parse_config(FeatureConfig)
    if not config.table:
        run_all(config)
    tables = make_tables(config.results)
    print(tables)
    if config.table:
        replace_section(PAGE, Path(config.results).stem.replace("_", " "), tables)


# ---- data: once for all runs ---------------------------------------------------------------------


@dataclass
class Side:
    """Videos with captions, as features."""

    video: torch.Tensor  # float32 [n_video, 1280], mean over frames; --towers: [n_video, T, 1280]
    text: torch.Tensor  # float32 [n_text, 384]; --towers: tokens, int64 [n_text, L]
    video_of_text: np.ndarray  # int64 [n_text]
    knowledge: Knowledge  # of the captions
    meaning: np.ndarray  # int64 [n_text]


def load_side(path: str, cache: Path, tokenizer: Tokenizer | None) -> Side:
    """tokenizer: of the towers; None: features for linear maps."""
    split = load_split("csv", path)
    knowledge = extract_many(split.captions, cache=cache / "knowledge")
    frames = video_features(split.video_paths, cache / "features").astype(np.float32)
    video = torch.from_numpy(frames)
    if tokenizer:
        text, _ = tokenizer.encode_batch(split.captions, TEXT_LENGTH)
    else:
        video = video.mean(dim=1)
        features = text_features(split.captions, cache / "features")
        text = torch.from_numpy(features.astype(np.float32))
    meaning = meaning_ids(split.captions, knowledge)
    return Side(video, text, split.video_of_caption, knowledge, meaning)


def load_sides(config: FeatureConfig) -> tuple[Side, Side]:
    """(training, gallery), standardised by the training features."""
    cache, tokenizer = Path(config.cache), None
    if config.towers:
        tokenizer = Tokenizer.train(load_split("csv", config.train).captions, VOCAB_SIZE)
    train = load_side(config.train, cache, tokenizer)
    if config.gallery == "tune":
        train, gallery = hold_out(train, HELD_OUT)
    else:
        gallery = load_side(config.val, cache, tokenizer)
    return standardise(train, by=train), standardise(gallery, by=train)


def hold_out(side: Side, count: int) -> tuple[Side, Side]:
    """(the other videos, `count` videos), always the same. UserError where there are few."""
    total = len(side.video)
    if total < 3 * count:
        raise UserError(
            f"--gallery tune: there are {total} training videos; to hold out {count} takes "
            f"{3 * count}: name a larger --train"
        )
    order = np.random.default_rng(0).permutation(total)
    return take_videos(side, order[count:]), take_videos(side, order[:count])


def take_videos(side: Side, videos: np.ndarray) -> Side:
    """These videos alone, in ascending order, with all their captions."""
    videos = np.sort(videos)
    texts = np.flatnonzero(np.isin(side.video_of_text, videos))
    return Side(
        side.video[videos],
        side.text[texts],
        np.searchsorted(videos, side.video_of_text[texts]),
        Knowledge(side.knowledge.names, side.knowledge.held[texts]),
        side.meaning[texts],
    )


def standardise(side: Side, by: Side) -> Side:
    """The features with the mean 0 and the deviation 1 that those of `by` would get."""
    scaled = {}
    for name in ("video", "text"):
        features = getattr(by, name)
        if features.is_floating_point():  # not tokens
            features = features.flatten(end_dim=-2)
            deviation = features.std(dim=0).clamp(min=1e-6)
            scaled[name] = (getattr(side, name) - features.mean(dim=0)) / deviation
    return replace(side, **scaled)


def hard_questions(side: Side, vocab: ConceptVocab, options: int = 5) -> np.ndarray:
    """Caption numbers [n, options], the right one first, then those of the highest overlap κ.

    No two options are of one video or one meaning. A caption without enough others that share
    knowledge with it is no question.
    """
    unit = unit_rows(vocab.encode(side.knowledge), vocab.idf)
    questions = []
    for caption in range(unit.shape[0]):
        overlap = (unit @ unit[[caption]].T).toarray()[:, 0]  # κ to all, [n_text]
        chosen = [caption]
        for other in np.argsort(-overlap, kind="stable")[:200]:
            same_video = side.video_of_text[other] == side.video_of_text[chosen]
            same_meaning = side.meaning[other] == side.meaning[chosen]
            if overlap[other] > 0 and not (same_video | same_meaning).any():
                chosen.append(other)
            if len(chosen) == options:
                questions.append(chosen)
                break
    return np.array(questions, np.int64).reshape(-1, options)


# ---- one run -------------------------------------------------------------------------------------


class FrameTower(nn.Module):
    """A small transformer over the features of a video's frames: [B, T, 1280] -> [B, E]."""

    def __init__(self, frames: int, feature_width: int, embed_dim: int):
        super().__init__()
        self.read = nn.Linear(feature_width, WIDTH)
        self.when = nn.Parameter(torch.zeros(frames, WIDTH))
        blocks = [Block(WIDTH, HEADS, quick_gelu=False) for _ in range(VIDEO_LAYERS)]
        self.blocks = nn.Sequential(*blocks)
        self.norm_out = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, embed_dim, bias=False)
        init_tower(self, WIDTH, VIDEO_LAYERS)

    def forward(self, frames):
        x = self.blocks(self.read(frames) + self.when)
        return self.project(self.norm_out(x).mean(dim=1))


class TokenTower(TextEncoder):
    """model.py's text tower, small. It finds the end of a caption by its mark: tokens -> [B, E]."""

    def __init__(self, embed_dim: int):
        sizes = dict(text_width=WIDTH, text_layers=TEXT_LAYERS, text_heads=HEADS)
        sizes |= dict(text_length=TEXT_LENGTH, vocab_size=VOCAB_SIZE, embed_dim=embed_dim)
        super().__init__(ModelConfig(**sizes))
        init_tower(self, WIDTH, TEXT_LAYERS)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.position_embed, std=0.01)

    def forward(self, tokens):
        end = tokens.argmax(dim=1, keepdim=True)  # the mark is the highest id
        return super().forward(tokens, torch.arange(tokens.shape[1]) <= end)


class Heads(nn.Module):
    """Two sides of the joint space, the logit scale, the concept head.

    The concept head comes last, so that the other weights do not depend on it.
    """

    def __init__(self, video: nn.Module, text: nn.Module, embed_dim: int, num_concepts: int):
        super().__init__()
        self.video, self.text = video, text
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.concept_head = nn.Linear(embed_dim, num_concepts)

    @classmethod
    def build(cls, side: Side, num_concepts: int, config: "FeatureConfig") -> "Heads":
        """One linear map per side, or the towers."""
        E, drop = config.embed_dim, nn.Dropout(config.dropout)
        if config.towers:
            video = nn.Sequential(drop, FrameTower(*side.video.shape[1:], E))
            return cls(video, TokenTower(E), E, num_concepts)
        video = nn.Sequential(drop, nn.Linear(side.video.shape[1], E))
        return cls(video, nn.Sequential(drop, nn.Linear(side.text.shape[1], E)), E, num_concepts)

    def forward(self, video, text):
        """The features of videos and captions -> unit vectors [B, E], [B', E], and the concept
        logits of both."""
        video_emb, text_emb = F.normalize(self.video(video)), F.normalize(self.text(text))
        widen = video_emb.shape[1] ** 0.5  # to unit variance, as model.CLOP does
        logits = (self.concept_head(emb * widen) for emb in (video_emb, text_emb))
        return video_emb, text_emb, *logits

    def embed(self, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors of all videos and captions of a side, [n_video, E] and [n_text, E]."""
        video = [self.video(part) for part in side.video.split(1024)]
        text = [self.text(part) for part in side.text.split(1024)]
        return F.normalize(torch.cat(video)), F.normalize(torch.cat(text))


def make_sampler(side: Side, vocab: ConceptVocab, fields: dict, batch_size, seed=0):
    """train.py's sampler, with the fields of a variant."""
    return KnowledgeBatchSampler(
        vocab.encode(side.knowledge),
        side.video_of_text,
        batch_size=batch_size,
        seed=seed,
        guided_share=fields["guided_share"],
        group_size=fields["group_size"],
        text_negatives=fields["text_negatives"],
    )


@torch.no_grad()
def find_hardest(heads, side: Side, anchors, pool) -> np.ndarray:
    """The captions of the pool that the heads take soonest for those of each anchor's video."""
    heads.eval()
    video_emb, text_emb = heads.embed(side)
    heads.train()
    videos, text_emb = video_emb[side.video_of_text[anchors]], text_emb[pool]
    hardest = [(rows @ text_emb.T).topk(64, dim=1).indices for rows in videos.split(1024)]
    return pool[torch.cat(hardest).numpy()]


def train_heads(side: Side, vocab: ConceptVocab, fields: dict, config: FeatureConfig, seed: int):
    """Heads trained by `clop_loss` with the fields of a variant."""
    torch.manual_seed(seed)
    heads = Heads.build(side, len(vocab), config)
    heads.concept_head.bias.data.copy_(torch.from_numpy(vocab.log_odds))
    matrices = [p for p in heads.parameters() if p.ndim == 2]
    others = [p for p in heads.parameters() if p.ndim < 2]
    groups = [
        dict(params=matrices, weight_decay=config.weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)

    sampler = make_sampler(side, vocab, fields, config.batch_size, seed)
    steps = config.epochs * len(sampler)

    def share_of_lr(step):
        return min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_lr)
    held, idf = vocab.encode(side.knowledge), torch.from_numpy(vocab.idf)
    loss_fields = {name: x for name, x in fields.items() if hasattr(LossConfig, name)}
    losses = LossConfig(**loss_fields)

    for epoch in range(config.epochs):
        is_guided = epoch >= fields["guided_from"] * config.epochs and epoch
        find = functools.partial(find_hardest, heads, side) if is_guided else None
        for samples in sampler.plan(epoch, find_hardest=find):
            videos = side.video_of_text[samples]
            concepts = torch.from_numpy(held[samples].toarray())
            signature = np.stack([videos, side.meaning[samples]], axis=1)
            shown = side.video[videos[: config.batch_size]]
            video_emb, text_emb, *concept_logits = heads(shown, side.text[samples])
            loss, _ = clop_loss(
                video_emb,
                text_emb,
                heads.logit_scale,
                losses,
                knowledge=concept_vectors(concepts, idf),
                signature=torch.from_numpy(signature),
                concept_logits=concept_logits,
                concepts=concepts,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return heads.eval()


@torch.inference_mode()
def measure(heads: Heads, side: Side, questions: np.ndarray) -> dict[str, float]:
    """Ranks and multiple choice on a gallery."""
    video_emb, text_emb = heads.embed(side)
    metrics = summarize(retrieval_ranks(text_emb, video_emb, side.video_of_text))
    if len(questions):
        video = video_emb[side.video_of_text[questions[:, 0]]].double()  # [n, E]
        options = text_emb[questions].double()  # [n, options, E]
        scores = torch.einsum("nke,ne->nk", options, video)
        metrics |= summarize(multiple_choice_points(scores, np.zeros(len(questions), np.int64)))
    return metrics


# ---- all runs ------------------------------------------------------------------------------------

NOT_SETTINGS = ("variants", "seeds", "cache", "results", "table")  # runs may differ in them


def settings(config: dict) -> dict:
    """What two runs must share to be compared."""
    return {name: config[name] for name in asdict(FeatureConfig()) if name not in NOT_SETTINGS}


def run_all(config: FeatureConfig, load=load_sides) -> None:
    """Do every run that --results does not hold yet."""
    shared, records = settings(asdict(config)), read_runs(config.results)
    done = [(record["seed"], record["config"]) for record in records]
    todo = []
    for seed in range(config.seeds):
        for name in config.variants.split():
            fields = variant_fields(name, VARIANTS)
            if (seed, shared | fields) not in done:
                todo.append((seed, name, fields))
    print(f"{len(records)} runs are in {config.results}, {len(todo)} to do", flush=True)
    if not todo:
        return

    train, gallery = load(config)
    vocab = ConceptVocab.build(train.knowledge)
    questions = hard_questions(gallery, vocab)
    counts = dict(videos=len(gallery.video), captions=len(gallery.text), questions=len(questions))
    print(f"{len(train.text)} captions, {len(vocab)} concepts; gallery: {counts}", flush=True)
    for seed, name, fields in todo:
        started = time.perf_counter()
        heads = train_heads(train, vocab, fields, config, seed)
        seconds = time.perf_counter() - started
        metrics = measure(heads, gallery, questions)
        record = dict(
            variant=name,
            seed=seed,
            metrics={key: round(value, 4) for key, value in metrics.items()},
            logit_scale=round(heads.logit_scale.exp().item(), 3),
            seconds=round(seconds, 1),
            config=shared | fields,
            cores=os.cpu_count(),
            **counts,
            **machine_facts("cpu"),
        )
        append_run(config.results, record)
        print(f"{name} seed {seed}: t2v R@1 {metrics['t2v_R@1']:.1f}, {seconds:.0f} s", flush=True)


def make_tables(results: str) -> str:
    """Markdown: for each group of runs that may be compared its settings and tables."""
    texts = []
    for runs in group_runs(read_runs(results), lambda record: settings(record["config"])):
        shown = {name: title for name, title in HEADINGS.items() if name in runs[0]["metrics"]}
        tables = markdown_tables(runs, shown, order_variants(runs, VARIANTS))
        texts.append(f"{describe_group(runs)}\n\n{tables}")
    if not texts:
        raise UserError(f"{results}: holds no runs yet; leave out --table to do them")
    return "\n\n".join(texts)


def describe_group(runs: list[dict]) -> str:
    """One line: what all of these runs share."""
    first, config = runs[0], runs[0]["config"]
    names = ("epochs", "batch_size", "lr", "weight_decay", "dropout", "embed_dim")
    chosen = "towers from scratch; " if config["towers"] else "linear maps; "
    chosen += ", ".join(f"{name} {config[name]}" for name in names)
    seconds = np.mean([record["seconds"] for record in runs])
    commits = ", ".join(dict.fromkeys(record["commit"] for record in runs))
    return (
        f"Gallery `{config['gallery']}`: {first['videos']:,} videos, {first['captions']:,} "
        f"captions, {first['questions']:,} questions; {chosen}; {seconds:.0f} s per run, "
        f"{first['hardware']}; commit {commits}"
    )


if __name__ == "__main__":
    run(main)
