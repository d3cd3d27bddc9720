"""HeartMuLa's music pipeline on vramkit: quantized while it loads, caches of the right size.

The models have the published structure; the language model has the published names of weights too.
"""

from __future__ import annotations

from .codec import CodecConfig, HeartCodec
from .model import HeartMuLa, HeartMuLaConfig, KVCache
from .pipeline import HeartMuLaGenPipeline, MusicOutput
from .profiles import Profile, profile
from .small import write_small

__all__ = [
    "CodecConfig",
    "HeartCodec",
    "HeartMuLa",
    "HeartMuLaConfig",
    "HeartMuLaGenPipeline",
    "KVCache",
    "MusicOutput",
    "Profile",
    "profile",
    "write_small",
]
