"""Modules of every kind, and a training of each under every registered scheme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.compressor import Compressor
from compressor.formats.errors import PolicyError
from compressor.formats.file.reader import PackedFile
from compressor.lifecycle.convert import decode_tensor
from compressor.policy.policy import Policy, Rule
from compressor.sharing.registry import SCHEMES

SHARING = sorted(name for name, scheme in SCHEMES.items() if scheme.shares)


class WeightStandardised(nn.Conv2d):
    """A convolution that reads its weight twice, as timm's weight-standardised ones do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return functional.conv2d(x, weight, self.bias) + self.weight.mean()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.embed(tokens))
        return output


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(16, 12), lambda: torch.randn(4, 16)),
    "tiny": (lambda: nn.Linear(5, 1), lambda: torch.randn(4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3), lambda: torch.randn(2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), lambda: torch.randn(2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 8, 3), lambda: torch.randn(2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), lambda: torch.randn(2, 8, 5, 5)),
    "embedding": (lambda: nn.Embedding(20, 8), lambda: torch.randint(20, (3, 5))),
    "attention": (Attention, lambda: torch.randn(2, 5, 16)),
    "standardised": (lambda: WeightStandardised(4, 8, 3), lambda: torch.randn(2, 4, 6, 6)),
    "tied": (Tied, lambda: torch.randint(20, (3, 5))),
}


def weight_of(job: Compressor) -> Tensor:
    model: Any = job.model
    found: Tensor = model.weight
    return found


def assert_it_is_what_is_computed(job: Compressor, dtype: torch.dtype) -> None:
    """Finishes a job of one layer: the weight keeps its dtype and every bit, in the model and in the file."""
    computed = weight_of(job).detach().clone()
    packed = job.finish()
    assert computed.dtype == dtype
    assert torch.equal(weight_of(job), computed)
    with PackedFile.from_bytes(packed.to_bytes()) as file:
        shared = file.shared("weight")
        assert torch.equal(decode_tensor(shared, file.books[shared.book]), computed)


def assert_weights_stay_finite(job_of: Callable[[nn.Module], Compressor], weights: Tensor) -> None:
    """Trains two steps and packs a layer of these weights, float[12, 12]; ``job_of`` makes the job of a layer."""
    model = nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        model.weight.copy_(weights)
    job = job_of(model).prepare()
    opt = torch.optim.AdamW(job.param_groups(lr=1e-3))
    job.attach(opt, 2)
    train(job, torch.randn(4, 12) * 1e-3, opt, 2)
    packed = job.finish()
    assert torch.isfinite(weight_of(job)).all()
    assert len(packed.to_bytes()) > 0


def content_hashes_by_threads(job_of: Callable[[nn.Module], Compressor]) -> set[str]:
    """Packs a layer with one and with two threads, of more weights than torch gives to one, and returns the hashes."""
    before = torch.get_num_threads()
    torch.manual_seed(3)
    model, hashes = nn.Linear(300, 300), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with PackedFile.from_bytes(job_of(model).prepare().finish().to_bytes()) as file:
                hashes.add(file.content_sha256())
    finally:
        torch.set_num_threads(before)
    return hashes


def rule_of(scheme: str, match: str = "*") -> Rule:
    """Returns a rule of two bits where the scheme takes bits, else of its defaults."""
    try:
        SCHEMES[scheme].settings_for_bits(2)
    except PolicyError:
        return Rule(match, scheme=scheme)
    return Rule(match, scheme=scheme, bits=2)


def job_of(model: nn.Module, scheme: str, **options: Any) -> Compressor:
    return Compressor(model, Policy([rule_of(scheme)]), teacher=None, **options)


def train(job: Compressor, inputs: Tensor, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (job.model(inputs).square().mean() + job.penalty()).backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
}
