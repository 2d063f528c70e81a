"""What CLOP's parts buy on real clips with real captions: small towers on frozen feature maps.

    python -m bench.real_features                # three variants on the validation file: once
    python -m bench.real_features --gallery tune --seeds 1 --variants "base all:beta=2" \\
        --results tuning.jsonl                   # before that: choose settings
    python -m bench.real_features --train mine.csv --val mine_val.csv --results mine.jsonl
    python -m bench.real_features --table        # only the tables, from the records

The frames go through a frozen EfficientNet-Lite0 once (frozen_features.py). What reads its feature
maps is trained from scratch: a small transformer over the places of all frames. So is the text
tower, model.py's own: nothing has told it what a word means. All else is used as it is: CLOP's
projections and heads, extract_many on the captions, ConceptVocab, KnowledgeBatchSampler, clop_loss,
eval's ranks.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
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
from bench.frozen_features import video_features
from bench.paired import append_run, group_runs, markdown_tables, read_runs, replace_section
from captions.tokenizer import Tokenizer
from cli import UserError, parse_config, run
from data import KnowledgeBatchSampler, by_video
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
from model import CLOP, Block, ModelConfig, init_tower

HELD_OUT = 300  # training videos that make the tuning gallery

# of both towers
WIDTH, HEADS, LAYERS, TEXT_LENGTH, VOCAB_SIZE = 128, 4, 2, 20, 4096

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
    """CLOP's losses, with small towers on frozen feature maps of real videos."""

    train: str = "../shared/msrvtt_mini/train.csv"  # csv or jsonl with columns video, caption
    val: str = "../shared/msrvtt_mini/val.csv"  # the same, for --gallery val
    gallery: Literal["tune", "val"] = "val"  # tune: 300 training videos, held out
    variants: str = "base skp all"  # of VARIANTS, or changed: NAME:field=value,…
    seeds: int = 5  # seeds 0 … n − 1
    epochs: int = 3  # of all captions
    batch_size: int = 256  # pairs
    lr: float = 1e-3  # peak learning rate; cosine to zero
    weight_decay: float = 0.1  # of matrices
    dropout: float = 0.5  # of the channels of the maps
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
    """Videos, as feature maps, with captions."""

    video: torch.Tensor  # float32 [n_video, T, P, 1280]
    tokens: torch.Tensor  # int64 [n_text, L]
    text_mask: torch.Tensor  # bool [n_text, L]
    video_of_text: np.ndarray  # int64 [n_text]
    knowledge: Knowledge  # of the captions
    meaning: np.ndarray  # int64 [n_text]


def load_side(path: str, cache: Path, tokenizer: Tokenizer) -> Side:
    split = load_split("csv", path)
    knowledge = extract_many(split.captions, cache=cache / "knowledge")
    maps = video_features(split.video_paths, cache / "features").astype(np.float32)
    read = tokenizer.encode_batch(split.captions, TEXT_LENGTH)
    meaning = meaning_ids(split.captions, knowledge)
    return Side(torch.from_numpy(maps), *read, split.video_of_caption, knowledge, meaning)


def load_sides(config: FeatureConfig) -> tuple[Side, Side]:
    """(training, gallery), standardised by the training features."""
    cache = Path(config.cache)
    tokenizer = Tokenizer.train(load_split("csv", config.train).captions, VOCAB_SIZE)
    train = load_side(config.train, cache, tokenizer)
    if config.gallery == "tune":
        train, gallery = hold_out(train, HELD_OUT)
    else:
        gallery = load_side(config.val, cache, tokenizer)

    mean = train.video.mean(dim=(0, 1, 2))
    deviation = train.video.std(dim=(0, 1, 2)).clamp(min=1e-6)
    for side in (train, gallery):
        side.video.sub_(mean).div_(deviation)
    return train, gallery


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
        side.tokens[texts],
        side.text_mask[texts],
        np.searchsorted(videos, side.video_of_text[texts]),
        Knowledge(side.knowledge.names, side.knowledge.held[texts]),
        side.meaning[texts],
    )


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


class MapTower(nn.Module):
    """A small transformer over the places of all frames: [B, T, P, 1280] -> features [B, WIDTH]."""

    def __init__(self, frames: int, places: int, channels: int, config: FeatureConfig):
        super().__init__()
        self.drop = nn.Dropout(config.dropout)
        self.read = nn.Linear(channels, WIDTH)
        self.when = nn.Parameter(torch.zeros(frames, WIDTH))
        self.where = nn.Parameter(torch.zeros(places, WIDTH))
        blocks = [Block(WIDTH, HEADS, quick_gelu=False) for _ in range(LAYERS)]
        self.blocks = nn.Sequential(*blocks)
        self.norm_out = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, config.embed_dim, bias=False)
        init_tower(self, WIDTH, LAYERS)

    def forward(self, maps):
        kept = self.drop(maps.new_ones(len(maps), 1, 1, maps.shape[-1]))  # channels, in all places
        x = self.read(maps * kept) + self.when[:, None] + self.where  # [B, T, P, WIDTH]
        return self.norm_out(self.blocks(x.flatten(1, 2))).mean(dim=1)


def build_model(side: Side, num_concepts: int, config: FeatureConfig) -> CLOP:
    """CLOP, with a small text tower, and a MapTower in the place of the one that reads pixels."""
    text = dict(text_width=WIDTH, text_layers=LAYERS, text_heads=HEADS, text_length=TEXT_LENGTH)
    video = dict(image_size=16, video_width=WIDTH, video_layers=1, video_heads=HEADS)
    sizes = dict(vocab_size=VOCAB_SIZE, embed_dim=config.embed_dim, num_concepts=num_concepts)
    model = CLOP(ModelConfig(**text, **video, **sizes))
    model.video = MapTower(*side.video.shape[1:], config)
    return model


def embed(model: CLOP, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of all videos and captions of a side, [n_video, E] and [n_text, E]."""
    video = [model.encode_video(part) for part in side.video.split(1024)]
    texts = zip(side.tokens.split(1024), side.text_mask.split(1024))
    return torch.cat(video), torch.cat([model.encode_text(*part) for part in texts])


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
def find_hardest(model, side: Side, anchors, pool) -> np.ndarray:
    """The captions of the pool that the model takes soonest for those of each anchor's video."""
    model.eval()
    video_emb, text_emb = embed(model, side)
    model.train()
    videos, text_emb = video_emb[side.video_of_text[anchors]], text_emb[pool]
    hardest = [(rows @ text_emb.T).topk(64, dim=1).indices for rows in videos.split(1024)]
    return pool[torch.cat(hardest).numpy()]


def train(side: Side, vocab: ConceptVocab, fields: dict, config: FeatureConfig, seed: int) -> CLOP:
    """A model trained by `clop_loss` with the fields of a variant."""
    torch.manual_seed(seed)
    model = build_model(side, len(vocab), config)
    model.init_concept_bias(torch.from_numpy(vocab.log_odds))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
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
    weight = 1 / np.bincount(side.video_of_text)[side.video_of_text]
    share = by_video(side.video_of_text, weight) @ held
    loss_fields = {name: x for name, x in fields.items() if hasattr(LossConfig, name)}
    losses = LossConfig(**loss_fields)

    for epoch in range(config.epochs):
        is_guided = epoch >= fields["guided_from"] * config.epochs and epoch
        find = functools.partial(find_hardest, model, side) if is_guided else None
        for samples in sampler.plan(epoch, find_hardest=find):
            videos = side.video_of_text[samples]
            concepts = torch.from_numpy(held[samples].toarray())
            signature = np.stack([videos, side.meaning[samples]], axis=1)
            shown = side.video[videos[: config.batch_size]]
            texts = side.tokens[samples], side.text_mask[samples]
            video_emb, text_emb, *concept_logits = model(shown, *texts)
            loss, _ = clop_loss(
                video_emb,
                text_emb,
                model.logit_scale,
                losses,
                knowledge=concept_vectors(concepts, idf),
                signature=torch.from_numpy(signature),
                concept_logits=concept_logits,
                concepts=concepts,
                video_concepts=torch.from_numpy(share[videos[: config.batch_size]].toarray()),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def measure(model: CLOP, side: Side, questions: np.ndarray) -> dict[str, float]:
    """Ranks and multiple choice on a gallery."""
    video_emb, text_emb = embed(model, side)
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

    training, gallery = load(config)
    vocab = ConceptVocab.build(training.knowledge)
    questions = hard_questions(gallery, vocab)
    counts = dict(videos=len(gallery.video), captions=len(gallery.tokens), questions=len(questions))
    print(f"{len(training.tokens)} captions, {len(vocab)} concepts; gallery: {counts}", flush=True)
    for seed, name, fields in todo:
        started = time.perf_counter()
        model = train(training, vocab, fields, config, seed)
        seconds = time.perf_counter() - started
        metrics = measure(model, gallery, questions)
        record = dict(
            variant=name,
            seed=seed,
            metrics={key: round(value, 4) for key, value in metrics.items()},
            logit_scale=round(model.logit_scale.exp().item(), 3),
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
    chosen = ", ".join(f"{name} {config[name]}" for name in names)
    seconds = np.mean([record["seconds"] for record in runs])
    commits = ", ".join(dict.fromkeys(record["commit"] for record in runs))
    return (
        f"Gallery `{config['gallery']}`: {first['videos']:,} videos, {first['captions']:,} "
        f"captions, {first['questions']:,} questions; {chosen}; {seconds:.0f} s per run, "
        f"{first['hardware']}; commit {commits}"
    )


if __name__ == "__main__":
    run(main)
