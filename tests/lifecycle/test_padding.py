"""The padding row of an embedding: zero before sharing, zero after it, under every scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor import SCHEMES, Compressor, Policy, Rule
from compressor.formats.errors import UsageError


class Bag(nn.Module):
    """The mean of word vectors, and a linear layer that may be tied to them."""

    def __init__(self, kind: str, padding: int | None) -> None:
        super().__init__()
        self.embed = getattr(nn, kind)(40, 16, padding_idx=padding)
        self.head = nn.Linear(16, 4)
        self.mean = kind == "Embedding"

    def forward(self, words: Tensor) -> Tensor:
        """Return logits."""
        vectors = self.embed(words)
        return torch.as_tensor(self.head(vectors.mean(1) if self.mean else vectors))


def batches() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(40, (32, 6), generator=generator)
    words[:, 4:] = 3
    return DataLoader(TensorDataset(words, torch.randint(4, (32,), generator=generator)), 8)


def vectors(job: Compressor) -> Tensor:
    embedding: Any = job.model.get_submodule("embed")
    return torch.as_tensor(embedding.weight)


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.shares])
def test_padding_stays_zero(scheme: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    job = Compressor(Bag(kind, padding=3), Policy([Rule("*", scheme=scheme)]), teacher=None).prepare()
    job.finetune(batches(), epochs=2, lr=0.05)
    assert torch.equal(vectors(job)[3], torch.zeros(16))
    job.finish().save(tmp_path / "small.safetensors")
    loaded = compressor.load_state_dict(tmp_path / "small.safetensors")["embed.weight"]
    assert torch.equal(loaded[3], torch.zeros(16))
    assert int((loaded.any(dim=1)).sum()) == 39


def test_padding_rows_that_are_not_zero_are_shared_like_others() -> None:
    model = Bag("Embedding", padding=3)
    with torch.no_grad():
        model.embed.weight[3] = torch.linspace(1.0, 2.0, 16)
    job = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=4)]), teacher=None).prepare()
    job.finish()
    assert not (vectors(job)[3] == 0).any()


def test_embeddings_without_padding_have_no_pinned_zeros() -> None:
    model = Bag("Embedding", padding=None)
    with torch.no_grad():
        model.embed.weight[3] = 0
    job = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=4)]), teacher=None).prepare()
    assert not any(group.has_zeros for group in job.groups)


def test_padding_drawn_from_scratch_is_zero() -> None:
    with torch.device("meta"):
        model = Bag("Embedding", padding=3)
    job = Compressor(model, Policy([Rule("*", scheme="hashed", bits=4)]), from_scratch=True).prepare()
    job.finetune(batches(), epochs=1)
    assert torch.equal(vectors(job)[3], torch.zeros(16))


def test_virtual_embeddings_cannot_pin_their_padding() -> None:
    job = Compressor(Bag("Embedding", padding=3), Policy([Rule("*", scheme="hashed", bits=4)]), teacher=None)
    with pytest.raises(UsageError, match=r"virtual=True: embed\.weight is pruned"):
        job.prepare(virtual=True)
