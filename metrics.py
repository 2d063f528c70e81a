"""Ranks, ties, R@K; multiple choice; dual softmax: the numbers that a retrieval paper reports, each defined once.

Retrieval asks one question many times: among all videos, at which place does the right one stand? With sim
[n_text, n_video] (row = caption, column = video) each caption ranks its row, text to video (t2v), and each video ranks
its column (v2t):

    rank = 1 + (wrong candidates that score strictly better) + ½ (wrong candidates that tie)
    R@K  = percent of queries with rank ≤ K          MdR, MnR = median and mean rank (1 is best)

Three details make or break the number:
- *Ties.* A tie counts half, so a model that scores everything alike gets the middle rank: chance, as it should.
  (Counting only the strictly better ones would give it R@1 = 100.) A rank may thus be 1.5, which is no hit for R@1.
- *Several captions a video.* Each caption is a t2v query of its own. In v2t a video takes the best rank that any of its
  captions reaches; its other captions never compete. A video without captions asks nothing but stays in the gallery.
- *What equal means.* Floating-point sums depend on their order, so one pair may score differently in two tiles of the
  same product. `similarity` rounds embeddings to 26 binary places and multiplies in fp64, where such sums have no
  rounding error at all: a score is then a number, not an accident of tile, thread or machine, and equal embeddings tie
  exactly. It is also nearer to the true product than fp32 would be, for about twice the time.

Counting half the ties makes one formula of it, since (1 + sign(x)) / 2 is 1 above zero, ½ at zero, 0 below:

    rank = 1 + Σ_wrong (1 + sign(s_wrong − s_right)) / 2

A sum over candidates can be taken tile by tile: 100,000 captions × 100,000 videos need no matrix of 80 GB.

Multiple choice asks which of five captions fits a video; tied options share the point: a constant model gets chance.

    python metrics.py       # a table by hand: three captions, three videos, one tie
"""

from collections.abc import Sequence

import numpy as np
import torch

from cli import UserError, run

# ---- ranks -----------------------------------------------------------------------------------------------------------


def to_grid(emb) -> torch.Tensor:
    """[N, E] -> float64, rounded to 2^-26 of the longest row, so that fp64 sums of products are exact in any order:

    products are multiples of 2^-52 and every partial sum stays below 2 (Cauchy-Schwarz), which 53 bits hold.
    """
    emb = torch.as_tensor(emb).detach().double()
    longest = emb.norm(dim=1).max().clamp(min=1e-30)
    unit = 2.0 ** torch.floor(torch.log2(longest) + 0.6)  # a power of two: dividing by it loses nothing
    return torch.round(emb / unit * 2**26) / 2**26 * unit


def _check_finite(scores, what: str):
    if not torch.isfinite(scores).all():
        raise UserError(f"{what}: NaN or infinity inside; the model has diverged or its checkpoint is damaged")


def similarity(text_emb, video_emb) -> torch.Tensor:
    """sim [n_text, n_video], float64: dot products of embeddings [n, E], exact after rounding to 26 binary places."""
    return to_grid(text_emb) @ to_grid(video_emb).T


def _ranks(scores, positive, video_of_text, n_video: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(t2v [n_text], v2t [videos with captions]), float64: a rank may end in .5.

    scores(rows, columns) yields one float64 tile of sim; positive [n_text] are the scores of the right pairs.
    """
    n_text, device = len(positive), positive.device
    best = torch.full((n_video,), -torch.inf, dtype=torch.float64, device=device)
    best.scatter_reduce_(0, video_of_text, positive, "amax")          # a video is as good as its best caption
    above = torch.zeros(n_text, dtype=torch.float64, device=device)   # Σ sign over all candidates, right ones too
    below = torch.zeros(n_video, dtype=torch.float64, device=device)
    for i in range(0, n_text, chunk):
        for j in range(0, n_video, chunk):
            rows, columns = slice(i, i + chunk), slice(j, j + chunk)
            tile = scores(rows, columns)                              # [≤ chunk, ≤ chunk]
            above[rows] += (tile - positive[rows, None]).sign_().sum(1)
            below[columns] += (tile - best[columns]).sign_().sum(0)
    # take the right candidates out again: one of a caption, of a video all its captions
    own = torch.zeros_like(best).index_add_(0, video_of_text, (1 + (positive - best[video_of_text]).sign()) / 2)
    t2v = 1 + (n_video + above) / 2 - 0.5
    v2t = 1 + (n_text + below) / 2 - own
    return t2v.cpu().numpy(), v2t[best > -torch.inf].cpu().numpy()


def _check_pairs(video_of_text, n_text: int, n_video: int, device) -> torch.Tensor:
    video_of_text = torch.as_tensor(video_of_text, device=device).long()
    assert video_of_text.shape == (n_text,) and n_text, f"{tuple(video_of_text.shape)} indices for {n_text} captions"
    first, last = int(video_of_text.min()), int(video_of_text.max())
    assert 0 <= first and last < n_video, f"video_of_text runs from {first} to {last}, but there are {n_video} videos"
    return video_of_text


def retrieval_ranks(text_emb, video_emb, video_of_text, *, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (t2v [n_text], v2t [videos with captions]), 1-based, ties half, of embeddings [n_text, E], [n_video, E].

    Equals the ranks of `similarity(text_emb, video_emb)` for every `chunk`, in memory that grows with n, not n².
    Tiles of 1,024² stay in a CPU's cache: larger ones are slower. Raises UserError where an embedding is not finite.
    """
    text, video = to_grid(text_emb), to_grid(video_emb)
    _check_finite(text, "text embeddings")
    _check_finite(video, "video embeddings")
    video_of_text = _check_pairs(video_of_text, len(text), len(video), text.device)
    positive = torch.cat([(text[i:i + chunk] * video[video_of_text[i:i + chunk]]).sum(1)
                          for i in range(0, len(text), chunk)])
    return _ranks(lambda rows, columns: text[rows] @ video[columns].T, positive, video_of_text, len(video), chunk)


def summarize_ranks(t2v: np.ndarray, v2t: np.ndarray) -> dict[str, float]:
    """{"t2v_R@1": …, R@5, R@10 (percent), MdR, MnR, and the same for v2t}."""
    metrics = {}
    for direction, ranks in (("t2v", t2v), ("v2t", v2t)):
        for k in (1, 5, 10):
            metrics[f"{direction}_R@{k}"] = 100 * float(np.mean(ranks <= k))
        metrics[f"{direction}_MdR"] = float(np.median(ranks))
        metrics[f"{direction}_MnR"] = float(np.mean(ranks))
    return metrics


def retrieval_metrics(sim, video_of_text) -> dict[str, float]:
    """t2v_R@1, t2v_R@5, t2v_R@10, t2v_MdR, t2v_MnR and the same for v2t.

    sim [n_text, n_video], array or tensor: row = caption, column = video. video_of_text [n_text]: the column of each
    caption's video. R@K in percent counts ranks ≤ K; MdR, MnR 1-based. Raises UserError where sim is not finite.
    Protocol: with one caption a video MSR-VTT 1k-A's, with several MSVD's.
    """
    sim = sim.detach() if isinstance(sim, torch.Tensor) else torch.from_numpy(np.require(sim, requirements=["C", "W"]))
    assert sim.ndim == 2, f"sim has shape {tuple(sim.shape)}, not [n_text, n_video]"
    n_text, n_video = sim.shape
    video_of_text = _check_pairs(video_of_text, n_text, n_video, sim.device)

    def scores(rows, columns):
        tile = sim[rows, columns].double()
        _check_finite(tile, "sim")
        return tile

    positive = sim[torch.arange(n_text, device=sim.device), video_of_text].double()
    return summarize_ranks(*_ranks(scores, positive, video_of_text, n_video, chunk=1024))


def retrieval_metrics_from_embeddings(text_emb, video_emb, video_of_text, *, chunk: int = 1024) -> dict[str, float]:
    """Exactly `retrieval_metrics(similarity(text_emb, video_emb), video_of_text)`, without ever holding sim.

    text_emb [n_text, E], video_emb [n_video, E]; see `retrieval_ranks`.
    """
    return summarize_ranks(*retrieval_ranks(text_emb, video_emb, video_of_text, chunk=chunk))


def multiple_choice_accuracy(scores, answers, kinds: Sequence[str] | None = None) -> dict[str, float]:
    """{"mc_accuracy": percent, "mc_accuracy_KIND": …}: how often the right option scores highest.

    scores [n, options], answers [n]: the right option, kinds [n]. Options that tie for the best share the point.
    Raises UserError where a score is not finite.
    """
    scores, answers = torch.as_tensor(scores).double().cpu().numpy(), np.asarray(answers)
    assert scores.ndim == 2 and answers.shape == (len(scores),), f"{scores.shape} scores for {answers.shape} answers"
    _check_finite(torch.from_numpy(scores), "multiple choice")
    chosen = scores == scores.max(axis=1, keepdims=True)                             # [n, options]
    points = 100 * chosen[np.arange(len(scores)), answers] / chosen.sum(axis=1)      # [n]
    metrics = {"mc_accuracy": float(points.mean())}
    for kind in sorted({*(() if kinds is None else kinds)} - {""}):
        metrics[f"mc_accuracy_{kind}"] = float(points[np.array(kinds) == kind].mean())
    return metrics


def dual_softmax_metrics(sim, video_of_text, scale: float) -> dict[str, float]:
    """{"dsl_t2v_R@1": …} and so on: the metrics of `retrieval_metrics` after the dual softmax.

    Each score is multiplied by the share that its query has among *all* queries that want the same candidate,
    sim_ij · softmax_i(scale · sim_ij) for t2v, over j for v2t: a candidate that everybody wants is worth less. That
    uses the whole query set at once, which a search engine never sees: such numbers compare only with their like.
    As in the paper, a score below zero times a small share moves *up* (CLIP's are all above). sim [n_text, n_video]
    float64; scale: exp(logit_scale). Cheng et al., https://arxiv.org/abs/2109.04290
    """
    t2v = retrieval_metrics(sim * torch.softmax(scale * sim, dim=0), video_of_text)
    v2t = retrieval_metrics(sim * torch.softmax(scale * sim, dim=1), video_of_text)
    return {f"dsl_{name}": (t2v if name.startswith("t2v") else v2t)[name] for name in t2v}


def main():
    sim = np.array([[0.9, 0.1, 0.2],   # caption 0 finds video 0
                    [0.5, 0.5, 0.1],   # caption 1 cannot tell its video 1 from video 0: rank 1.5
                    [0.8, 0.7, 0.6]])  # caption 2 finds its video 2 last
    for name, value in retrieval_metrics(sim, np.arange(3)).items():
        print(f"{name:9s}{value:6.1f}")
    print("a constant matrix:", f"R@1 {retrieval_metrics(np.ones((100, 100)), np.arange(100))['t2v_R@1']:.1f}")


if __name__ == "__main__":
    run(main)
