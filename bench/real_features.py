"""What CLOP's parts buy on real clips with real captions: its heads and losses on frozen features, seconds a run.

    python -m bench.real_features --gallery tune --results tuning.jsonl --seeds 1 --variants "base all all:beta=2"
    python -m bench.real_features                                   # then, once: all variants on the validation file
    python -m bench.real_features --train mine.csv --val mine_val.csv --results bench/results/mine.jsonl
    python -m bench.real_features --table                           # only the tables, from the file of results

The frames go through a frozen EfficientNet-Lite0 and the captions through a frozen MiniLM, once (frozen_features.py).
What is trained is what CLOP adds: one linear map a side into the joint space, the logit scale, the concept head. All
else is the real thing and used as it is: concepts.extract_many on the captions, ConceptVocab, KnowledgeBatchSampler,
losses.clop_loss, eval's ranks. So the question is a small one, and answered on real data: given the same features, do
SKP and KCL make a better joint space than InfoNCE alone?

`--gallery tune` holds out 300 of the training videos (always the same), trains on the rest and measures on these: all
settings are chosen there. `--gallery val` trains on all training videos and measures on --val, which is touched once.

Besides ranks there is a multiple choice: which of five captions is this video's? The wrong four are captions of other
videos of the gallery, those of the highest overlap κ with the right one that are not false negatives.

MSR-VTT has twenty captions a video. Captions of the same video, or that say the same, meet in a batch as negatives;
"base" leaves them in, as plain InfoNCE does (and everybody trains it); "masks" alone shows what leaving them out buys.

With ../shared/msrvtt_mini: 3,151 training clips, 63,020 captions, "244-clip validation gallery"; sampled frames and
half of the clips with two of them: not comparable with published numbers.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from bench.ablation import BASE, order_variants, variant_fields  # noqa: E402
from bench.frozen_features import text_features, video_features  # noqa: E402
from bench.paired import append_run, group_runs, markdown_tables, read_runs, replace_section  # noqa: E402
from cli import UserError, parse_config, run  # noqa: E402
from knowledge import (ConceptVocab, concept_vectors, extract_many, meaning_ids, multi_hot,  # noqa: E402
                      nearest_by_overlap)
from data import KnowledgeBatchSampler  # noqa: E402
from datasets.published import load_split  # noqa: E402
from eval import machine_facts  # noqa: E402
from losses import LossConfig, clop_loss  # noqa: E402
from eval import multiple_choice_accuracy, retrieval_ranks, summarize_ranks  # noqa: E402
from datasets.split import Split  # noqa: E402

HELD_OUT = 300  # training videos that make the tuning gallery

# Chosen on the tuning gallery (LOG.md), where little made a difference; bench/ablation.py says what each field is.
SKP = dict(skp_weight=0.5)
SAMPLING = dict(guided_share=0.25)
WEIGHTING = dict(beta=1.0, mask_false_negatives=True)
MINING = dict(hard_k=16, hard_weight=0.5, mask_false_negatives=True)
VARIANTS = {
    "base": BASE,
    "skp": BASE | SKP,
    "sampling": BASE | SAMPLING,
    "masks": BASE | dict(mask_false_negatives=True),
    "weighting": BASE | WEIGHTING,
    "mining": BASE | MINING,
    "kcl": BASE | SAMPLING | WEIGHTING,
    "all": BASE | SKP | SAMPLING | WEIGHTING,
}
HEADINGS = {"t2v_R@1": "t2v R@1", "t2v_R@5": "R@5", "t2v_R@10": "R@10", "t2v_MdR": "MdR", "v2t_R@1": "v2t R@1",
            "v2t_R@5": "R@5", "v2t_R@10": "R@10", "mc_accuracy": "multiple choice"}


@dataclass
class FeatureConfig:
    """CLOP's heads and losses on frozen features of real videos and captions."""

    train: str = "../shared/msrvtt_mini/train.csv"  # csv or jsonl with columns video, caption
    val: str = "../shared/msrvtt_mini/val.csv"      # the same, for --gallery val
    gallery: Literal["tune", "val"] = "val"  # tune: 300 training videos, held out
    variants: str = "base skp sampling weighting kcl all"  # perhaps changed: NAME:field=value,…
    seeds: int = 5                # seeds 0 … n − 1
    epochs: int = 4               # of all captions
    batch_size: int = 256         # pairs
    lr: float = 1e-3              # peak learning rate; cosine to zero
    weight_decay: float = 0.1     # of matrices
    dropout: float = 0.5          # of the features
    embed_dim: int = 256          # E
    cache: str = "cache"          # features, extracted knowledge
    results: str = "bench/results/real_features.jsonl"  # a line for each run
    table: bool = False           # train nothing: print the tables, refresh docs/


def main():
    config = parse_config(FeatureConfig)
    if not config.table:
        run_all(config)
    print_tables(config.results, refresh=config.table)


# ---- data: once for all runs -----------------------------------------------------------------------------------------


@dataclass
class Side:
    """Videos with captions, as features."""

    video: torch.Tensor         # float32 [n_video, 1280], mean over frames
    text: torch.Tensor          # float32 [n_text, 384]
    video_of_text: np.ndarray   # int64 [n_text]
    knowledge: list             # of each caption
    meaning: np.ndarray         # int64 [n_text]


def load_side(path: str, cache: Path) -> Side:
    split = load_split("csv", path)
    knowledge = extract_many(split.captions, cache=cache / "knowledge")
    video = torch.from_numpy(video_features(split.video_paths, cache / "features").astype(np.float32)).mean(dim=1)
    text = torch.from_numpy(text_features(split.captions, cache / "features").astype(np.float32))
    return Side(video, text, split.video_of_caption, list(knowledge), meaning_ids(split.captions, knowledge))


def load_sides(config: FeatureConfig) -> tuple[Side, Side]:
    """(training, gallery), standardised by the training features."""
    train = load_side(config.train, Path(config.cache))
    if config.gallery == "tune":
        if len(train.video) < 3 * HELD_OUT:
            raise UserError(f"--gallery tune: {config.train} has {len(train.video)} videos; it takes {3 * HELD_OUT} to "
                            f"hold out {HELD_OUT}")
        order = np.random.default_rng(0).permutation(len(train.video))
        train, gallery = take_videos(train, order[HELD_OUT:]), take_videos(train, order[:HELD_OUT])
    else:
        gallery = load_side(config.val, Path(config.cache))
    for name in ("video", "text"):
        features = getattr(train, name)
        mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
        for side in (train, gallery):
            setattr(side, name, (getattr(side, name) - mean) / std)
    return train, gallery


def take_videos(side: Side, videos: np.ndarray) -> Side:
    """These videos alone, in ascending order, with all their captions."""
    videos = np.sort(videos)
    texts = np.flatnonzero(np.isin(side.video_of_text, videos))
    return Side(side.video[videos], side.text[texts], np.searchsorted(videos, side.video_of_text[texts]),
                [side.knowledge[i] for i in texts], side.meaning[texts])


def hard_questions(side: Side, vocab: ConceptVocab, options: int = 5) -> np.ndarray:
    """Caption ids [n, options], the right one first: beside it captions of other videos, of the highest overlap κ.

    No two options are of one video or one meaning. Captions with too few such others are no question.
    """
    sets = vocab.encode_many(side.knowledge)
    neighbours, _ = nearest_by_overlap(sets, vocab.idf, range(len(sets)), 200)
    questions = []
    for caption, near in enumerate(neighbours):
        chosen = [caption]
        for other in near[near >= 0]:
            if all(side.video_of_text[other] != side.video_of_text[c] and side.meaning[other] != side.meaning[c]
                   for c in chosen):
                chosen.append(other)
            if len(chosen) == options:
                questions.append(chosen)
                break
    return np.array(questions, np.int64).reshape(-1, options)


# ---- one run ---------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """One linear map a side. The concept head comes last, so that the other weights do not depend on it."""

    def __init__(self, video_width: int, text_width: int, embed_dim: int, num_concepts: int, dropout: float):
        super().__init__()
        self.video = nn.Sequential(nn.Dropout(dropout), nn.Linear(video_width, embed_dim))
        self.text = nn.Sequential(nn.Dropout(dropout), nn.Linear(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.concept_head = nn.Linear(embed_dim, num_concepts)  # starts from the log-odds, as in train.py

    def forward(self, video, text):
        """[B, 1280], [B, 384] → unit vectors [B, E], [B, E], concept logits [B, K] (scaled as model.CLOP does)."""
        video_emb, text_emb = F.normalize(self.video(video), dim=1), F.normalize(self.text(text), dim=1)
        return video_emb, text_emb, self.concept_head(video_emb * video_emb.shape[1] ** 0.5)


def train_heads(side: Side, vocab: ConceptVocab, fields: dict, config: FeatureConfig, seed: int) -> Heads:
    """Heads trained by `clop_loss` with the fields of a variant."""
    torch.manual_seed(seed)
    heads = Heads(side.video.shape[1], side.text.shape[1], config.embed_dim, len(vocab), config.dropout)
    heads.concept_head.bias.data.copy_(torch.from_numpy(vocab.log_odds))
    sets, idf = vocab.encode_many(side.knowledge), torch.from_numpy(vocab.idf)
    sampler = KnowledgeBatchSampler(
        sets, vocab.word_idf, side.video_of_text, side.meaning, batch_size=config.batch_size, seed=seed, drop_last=True,
        guided_share=fields["guided_share"], group_size=fields["group_size"],
        guided_from=round(fields["guided_from"] * config.epochs * (len(sets) // config.batch_size)))
    losses = LossConfig(**{name: value for name, value in fields.items() if name in vars(LossConfig())})
    decayed = [p for p in heads.parameters() if p.ndim == 2]
    optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=config.weight_decay),
                                   dict(params=[p for p in heads.parameters() if p.ndim < 2], weight_decay=0.0)],
                                  lr=config.lr, fused=True)
    steps = config.epochs * len(sampler)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * step / steps)))
    for epoch in range(config.epochs):
        for indices in sampler.batches(epoch):
            videos = side.video_of_text[indices]
            video_emb, text_emb, concept_logits = heads(side.video[videos], side.text[indices])
            concepts = multi_hot([sets[i] for i in indices], len(vocab)) if fields["skp_weight"] or fields["beta"] \
                else None
            loss, _ = clop_loss(
                video_emb, text_emb, heads.logit_scale, losses, concept_logits=concept_logits, concepts=concepts,
                knowledge=concept_vectors(concepts, idf) if fields["beta"] else None,
                signature=torch.from_numpy(np.stack([videos, side.meaning[indices]], axis=1)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return heads.eval()


@torch.inference_mode()
def measure(heads: Heads, side: Side, questions: np.ndarray) -> dict[str, float]:
    """Ranks and multiple choice on a gallery."""
    video_emb, text_emb = F.normalize(heads.video(side.video), dim=1), F.normalize(heads.text(side.text), dim=1)
    metrics = retrieval_metrics_of(text_emb, video_emb, side.video_of_text)
    if len(questions):
        asked = video_emb[torch.from_numpy(side.video_of_text[questions[:, 0]])]
        scores = torch.einsum("nke,ne->nk", text_emb[torch.from_numpy(questions)].double(), asked.double())
        metrics |= multiple_choice_accuracy(scores, np.zeros(len(questions), np.int64))
    return metrics


def describe_batches(side: Side, vocab: ConceptVocab, sampling: dict, batch_size: int, count: int = 20) -> dict:
    """What the negatives of `count` batches are like: mean κ, mean κ of each caption's nearest, false negatives a row.

    sampling: guided_share and group_size. False negatives (same video or meaning) are counted, and left out of both κ.
    """
    sets, idf = vocab.encode_many(side.knowledge), torch.from_numpy(vocab.idf)
    sampler = KnowledgeBatchSampler(sets, vocab.word_idf, side.video_of_text, side.meaning, batch_size=batch_size,
                                    drop_last=True, **sampling)
    mean, nearest, false = [], [], []
    for indices, _ in zip(sampler.batches(0), range(count)):
        vectors = concept_vectors(multi_hot([sets[i] for i in indices], len(vocab)), idf)
        video, meaning = side.video_of_text[indices], side.meaning[indices]
        same = torch.from_numpy((video[:, None] == video) | (meaning[:, None] == meaning))
        kappa = (vectors @ vectors.T).masked_fill(same, 0)                             # [B, B]
        mean.append((kappa.sum() / (~same).sum()).item())
        nearest.append(kappa.amax(dim=1).mean().item())
        false.append((same.sum() / len(same) - 1).item())
    return dict(kappa=round(np.mean(mean), 4), nearest_kappa=round(np.mean(nearest), 4),
                false_negatives=round(np.mean(false), 3))


# ---- all runs --------------------------------------------------------------------------------------------------------


def describe_settings(config: FeatureConfig) -> dict:
    """What two runs must share to be compared."""
    return {name: value for name, value in asdict(config).items()
            if name not in ("variants", "seeds", "cache", "results", "table")}


def run_all(config: FeatureConfig):
    """Do every run that --results does not hold yet."""
    wanted = [(seed, name, variant_fields(name, VARIANTS)) for seed in range(config.seeds)
              for name in config.variants.split()]
    shared, done = describe_settings(config), read_runs(config.results)
    todo = [(seed, name, fields) for seed, name, fields in wanted
            if not any(record["seed"] == seed and record["config"] == shared | fields for record in done)]
    print(f"{len(wanted) - len(todo)} runs are in {config.results}, {len(todo)} to do", flush=True)
    if not todo:
        return
    train, gallery = load_sides(config)
    vocab = ConceptVocab.build(train.knowledge)
    questions, batches = hard_questions(gallery, vocab), {}
    print(f"{len(train.text)} captions of {len(train.video)} videos, {len(vocab)} concepts; gallery "
          f"{len(gallery.video)} videos, {len(gallery.text)} captions, {len(questions)} questions", flush=True)
    for seed, name, fields in todo:
        started, sampling = time.perf_counter(), {name: fields[name] for name in ("guided_share", "group_size")}
        heads = train_heads(train, vocab, fields, config, seed)
        seconds = time.perf_counter() - started
        metrics = measure(heads, gallery, questions)
        kind = tuple(sampling.values())
        if kind not in batches:
            batches[kind] = describe_batches(train, vocab, sampling, config.batch_size)
        append_run(config.results, dict(
            variant=name, seed=seed, metrics={key: round(value, 4) for key, value in metrics.items()},
            batches=batches[kind], logit_scale=round(heads.logit_scale.exp().item(), 3), seconds=round(seconds, 1),
            config=shared | fields, videos=len(gallery.video), captions=len(gallery.text), questions=len(questions),
            cores=os.cpu_count(), **machine_facts("cpu")))
        print(f"{name} seed {seed}: t2v R@1 {metrics['t2v_R@1']:.1f}, R@5 {metrics['t2v_R@5']:.1f}, multiple choice "
              f"{metrics.get('mc_accuracy', float('nan')):.1f}, {seconds:.0f} s", flush=True)


def print_tables(results: str, refresh: bool = False):
    """The tables to stdout; refresh: also into the section of docs/ablation.md that has this file's name."""
    texts = []
    for runs in group_runs(read_runs(results), lambda record: [record["config"][name] for name in describe_settings(
            FeatureConfig())]):
        first, config = runs[0], runs[0]["config"]
        headings = {name: heading for name, heading in HEADINGS.items() if name in first["metrics"]}
        seconds = np.mean([record["seconds"] for record in runs])
        kinds = {(record["config"]["guided_share"], record["config"]["group_size"]): record["batches"]
                 for record in runs}
        texts.append(
            f"Gallery `{config['gallery']}`: {first['videos']:,} videos, {first['captions']:,} captions, "
            f"{first['questions']:,} questions; " + ", ".join(f"{name} {config[name]}" for name in (
                "epochs", "batch_size", "lr", "weight_decay", "dropout", "embed_dim"))
            + f"; {seconds:.0f} s a run, {first['hardware']}; commit "
            f"{', '.join(dict.fromkeys(record['commit'] for record in runs))}\n\n"
            + markdown_tables(runs, headings, order_variants(runs, VARIANTS)) + "\n\n"
            + "\n".join(f"- guided share {share}, groups of {group}: mean κ of a batch's negatives "
                        f"{facts['kappa']:.3f}, of each caption's nearest {facts['nearest_kappa']:.3f}; "
                        f"{facts['false_negatives']:.2f} false negatives a caption"
                        for (share, group), facts in sorted(kinds.items())))
    if not texts:
        raise UserError(f"{results}: holds no runs yet; leave out --table to do them")
    print("\n" + "\n\n".join(texts))
    if refresh:
        replace_section(ROOT / "docs" / "ablation.md", Path(results).stem.replace("_", " "), "\n\n".join(texts))


if __name__ == "__main__":
    run(main)
