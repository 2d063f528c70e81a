"""After `pip install -e .`: the README's functions, for scripts that lie elsewhere.

    import clop

    run = clop.load_checkpoint("runs/mine")
    frames = clop.open_cache("cache/frames", run.model.config)
    video_emb = clop.embed_videos(run.model, frames, ["clip.mp4"])

The modules of this repository have plain names (data, model, datasets), which other projects use,
too. So `clop` is the only name that is installed. It imports the others out of sight: afterwards
`import datasets` is somebody else's, as before.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
OURS = {path.stem for path in HERE.iterdir()} - {"clop"}


def take_out() -> dict:
    """{name: module} of all modules with names like ours, which are imported no longer."""
    names = [name for name in sys.modules if name.partition(".")[0] in OURS]
    return {name: sys.modules.pop(name) for name in names}


theirs = take_out()
sys.path.insert(0, str(HERE))
try:
    from data import open_cache
    from eval import embed_texts, embed_videos, similarity
    from training.checkpoint import load_checkpoint
finally:
    sys.path.remove(str(HERE))
    take_out()
    sys.modules.update(theirs)

__all__ = ["embed_texts", "embed_videos", "load_checkpoint", "open_cache", "similarity"]
