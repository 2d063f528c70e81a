"""Which captions does the model take for those of another video? They are KCL's hardest negatives.

DPR, ANCE and their like mine in a second round, too: what a model mixes up is found by the model.
What knowledge says may be true of a video stays out of its group
(data.KnowledgeBatchSampler.find_true).
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from kernels.distributed import gather, share_sizes
from search.query import embed_texts
from training.run import Run

MINED = 64  # captions for each sample


@torch.no_grad()
def mine(
    run: Run,
    embed_samples: Callable[[np.ndarray, int], Iterator[torch.Tensor]],
    anchors: np.ndarray,
    pool: np.ndarray,
) -> np.ndarray:
    """The captions of the pool [P] that the model takes soonest for those of each anchor's video.

    Returns samples, int64 [A, MINED], the hardest first (its own caption mostly among them).
    embed_samples: samples, place of the first -> parts of their video_emb [n, E]. Each rank embeds
    its share of the captions and of the anchors' videos, and looks for these anchors.
    """
    ranks, samples = run.ranks, run.data.samples
    started = time.perf_counter()

    def my_share(x):
        return np.array_split(x, ranks.world_size)[ranks.rank]

    def of_all_ranks(x, total):
        return gather(x, share_sizes(total, ranks.world_size))

    # embeddings of all captions, and of this rank's videos
    captions = [samples.split.captions[i] for i in my_share(pool)]
    text_emb = embed_texts(run.model, samples.tokenizer, captions).to(ranks.device)
    text_emb = of_all_ranks(text_emb, len(pool))
    place = sum(share_sizes(len(anchors), ranks.world_size)[: ranks.rank])
    video_emb = torch.cat(list(embed_samples(my_share(anchors), place))).to(text_emb.dtype)

    at_once = max(1, 2**25 // len(pool))  # rows of similarities that take 128 MB
    found = [
        (rows @ text_emb.T).topk(min(MINED, len(pool))).indices for rows in video_emb.split(at_once)
    ]

    index = of_all_ranks(torch.cat(found), len(anchors)).cpu().numpy()
    run.say(f"mined {len(anchors)} samples in {time.perf_counter() - started:.0f} s")
    return pool[index]
