"""Moving digits: a picture of a handwritten digit, and the video of it going to and fro.

The digits are scikit-learn's (1,797 of 8 x 8, from UCI); frames are 16 x 16. A video has a period
of 8 frames and moves by 2 pixels. The model gets the digit standing still, the phase as time step
and the frame before, as `MixedPrecisionLSD.generate_sequence` feeds it, and is to give the frame.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vramkit.training import LSD

SIDE, DIGIT, PERIOD, SPEED = 16, 8, 8, 2
TOP = (SIDE - DIGIT) // 2
STILL = 2  # the phase in which it stands in the middle
TRAINED = 1500  # digits to train on; the rest are held out


class Digits(NamedTuple):
    """Pictures [n, 8, 8] with values from 0 to 1, and which digit each is."""

    pictures: Tensor
    labels: Tensor


def load() -> tuple[Digits, Digits]:
    """Those to train on, and the held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.tensor(found.images / 16, dtype=torch.float32)
    labels = torch.tensor(found.target)
    return (
        Digits(pictures[:TRAINED], labels[:TRAINED]),
        Digits(pictures[TRAINED:], labels[TRAINED:]),
    )


def left(phase: Tensor) -> Tensor:
    """The column of a digit's left edge: to and fro."""
    phase = phase % PERIOD
    return SPEED * torch.minimum(phase, PERIOD - phase)


def frames(pictures: Tensor, phase: Tensor) -> Tensor:
    """[n, 3, 16, 16]: each picture in its own phase."""
    n = len(pictures)
    out = torch.zeros(n, 1, SIDE, SIDE)
    rows = TOP + torch.arange(DIGIT)
    columns = left(phase)[:, None] + torch.arange(DIGIT)
    out[torch.arange(n)[:, None, None], 0, rows[:, None], columns[:, None, :]] = pictures
    return out.expand(-1, 3, -1, -1)


def still(pictures: Tensor) -> Tensor:
    """What a video is made from: the digit in the middle."""
    return frames(pictures, torch.full((len(pictures),), STILL))


def model(base_channels: int = 16) -> LSD:
    """A model whose first outputs are as bright as frames are.

    It ends in a batch norm, whose scale of 1 would make pictures four times too bright; a short
    training would go into that alone.
    """
    made = LSD(base_channels, dropout=0.0, num_timesteps=PERIOD)
    last = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    nn.init.constant_(last.weight, 0.25)
    return made.to(memory_format=torch.channels_last)


def train(
    trained: LSD,
    digits: Digits,
    *,
    steps: int,
    batch: int = 16,
    lr: float = 8e-3,
    noise: float = 0.0,
    own: int = 0,
    seed: int = 1,
) -> list[float]:
    """Train on single frames; the loss of each step. Leaves the model in evaluation mode.

    In use the frame before is the model's own. `noise` is the standard deviation of what is added
    to the true one here; with `own`, up to so many frames of the model's own go before instead.
    """
    generator = torch.Generator().manual_seed(seed)
    trained.train()
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(digits.pictures), (batch,), generator=generator)
        phase = torch.randint(PERIOD, (batch,), generator=generator)
        pictures = digits.pictures[chosen]
        count = int(torch.randint(own + 1, (), generator=generator)) if own else 0
        before = frames(pictures, phase - 1 - count)
        before = before + noise * torch.randn(before.shape, generator=generator)
        with torch.no_grad():
            for late in range(count, 0, -1):
                before = trained(still(pictures), ((phase - late) % PERIOD).float(), before)
        made = trained(still(pictures), phase.float(), before)
        loss = F.mse_loss(made, frames(pictures, phase))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    trained.eval()
    return losses


class Judgement(NamedTuple):
    """Single next frames of held-out digits, from the true frame before."""

    error: float
    """Mean squared error of the model's frame."""
    copied: float
    """Of the frame before, given out as the next."""
    recognized: float
    """Share of its digits that a classifier by the nearest class mean names rightly."""
    readable: float
    """That share on the true frames, the most that can be asked for."""


def recognized(shown: Tensor, phase: Tensor, digits: Digits, trained_on: Digits) -> float:
    """Share of digits named rightly by the nearest mean of a class, cut out of frames."""
    means = torch.stack(
        [trained_on.pictures[trained_on.labels == k].mean(0) for k in range(10)]
    ).flatten(1)
    cut = torch.stack(
        [
            frame[TOP : TOP + DIGIT, x : x + DIGIT]
            for frame, x in zip(shown.float().mean(1), left(phase).tolist(), strict=True)
        ]
    )
    named = torch.cdist(cut.flatten(1), means).argmin(1)
    return float((named == digits.labels).float().mean())


@torch.inference_mode()
def judge(trained: Any, held_out: Digits, trained_on: Digits, *, seed: int = 2) -> Judgement:
    """One next frame for every held-out digit, each in a phase of its own."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.randint(PERIOD, (len(held_out.pictures),), generator=generator)
    before, target = (frames(held_out.pictures, phase + d) for d in (-1, 0))
    made = trained(still(held_out.pictures), phase.float(), before).float()
    return Judgement(
        float(F.mse_loss(made, target)),
        float(F.mse_loss(before, target)),
        recognized(made, phase, held_out, trained_on),
        recognized(target, phase, held_out, trained_on),
    )


def timesteps(count: int) -> list[float]:
    """The time steps of a video that begins where the digit stands still."""
    return [float((STILL + 1 + n) % PERIOD) for n in range(count)]
