# SPDX-License-Identifier: Apache-2.0
"""python -m kernels: the op on 512 random pairs, tiled against the reference."""

import math

import torch
import torch.nn.functional as F

from . import knowledge_nce

torch.manual_seed(0)
video = F.normalize(torch.randn(512, 64), dim=1)
text = F.normalize(torch.randn(512, 64), dim=1)
concepts = F.normalize((torch.rand(512, 100) < 0.05).float(), dim=1)
print(f"ln 512 = {math.log(512):.5f}; knowledge makes it harder")

for impl in ("reference", "tiled"):
    loss, mined = knowledge_nce(video, text, 0.0, concepts=concepts, beta=2.0, k=3, impl=impl)
    print(f"  loss {loss:.5f}; hardest texts of video 0: {mined.v2t_index[0].tolist()}")
