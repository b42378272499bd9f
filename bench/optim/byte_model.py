"""A byte-level transformer on the sources of Python's standard library: two blocks of width 32, context 32."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

WIDTH, HEADS, BLOCKS, CONTEXT, BATCH, SYMBOLS = 32, 2, 2, 32, 16, 128


@cache
def text() -> tuple[Tensor, Tensor]:
    """Bytes of the first 60 top-level modules by name, without those from 128 on: 90 % to train, the rest to test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    data = b"".join(file.read_bytes() for file in files)
    symbols = torch.tensor([b for b in data if b < SYMBOLS])
    cut = len(symbols) * 9 // 10
    return symbols[:cut], symbols[cut:]


def batch(source: Tensor, generator: torch.Generator, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Windows of the text and the bytes that follow."""
    start = torch.randint(len(source) - CONTEXT - 1, (size,), generator=generator)
    windows = source[start[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


class Block(nn.Module):
    """Causal attention and a GELU MLP of four times the width, RMSNorm before each."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x))))


class ByteModel(nn.Module):
    """Logits of the next byte."""

    def __init__(self, embedding_std: float) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS, bias=False)
        for table in (self.symbols, self.places):
            nn.init.normal_(table.weight, std=embedding_std)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.symbols(x) + self.places(torch.arange(x.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(h)))
        return logits


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Nats a byte."""
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]],
    *,
    steps: int = 200,
    seed: int = 0,
    embedding_std: float = 0.02,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Train with rates that fall to zero along a cosine; returns the loss on 512 windows of the test text.

    Embeddings start with GPT-2's deviation, 0.02; torch's own is 1.
    """
    torch.manual_seed(seed)
    model = ByteModel(embedding_std)
    several = optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps))) for o in several
    ]
    source, held_out = text()
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        model.zero_grad()
        loss = loss_of(model, *batch(source, generator))
        loss.backward()
        for optimizer, schedule in zip(several, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if on_step is not None:
            on_step(step, float(loss))
    with torch.no_grad():
        return float(loss_of(model, *batch(held_out, torch.Generator().manual_seed(1234), 512)))
