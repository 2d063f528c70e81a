# SPDX-License-Identifier: Apache-2.0
"""python -m kernels: the op on 512 random pairs, tiled against the reference."""

import math

import torch
import torch.nn.functional as F

from . import knowledge_nce

torch.manual_seed(0)
video, text = (F.normalize(torch.randn(512, 64), dim=1) for _ in range(2))
concepts = F.normalize((torch.rand(512, 100) < 0.05).float(), dim=1)
for impl in ("reference", "tiled"):
    loss, mined = knowledge_nce(video, text, 0.0, concepts=concepts, beta=2.0, k=3, impl=impl)
    print(
        f"  loss {loss:.5f} (ln 512 = {math.log(512):.5f}, and harder with knowledge); "
        f"hardest texts of video 0: {mined.v2t_index[0].tolist()}"
    )
