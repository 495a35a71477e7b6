"""Deep Compression's trained centroids against the paper's own worked example."""

from __future__ import annotations

import torch
from torch import nn

from compressor.compressor import Compressor
from compressor.ops.gather_scatter import lookup
from compressor.policy.policy import Policy, Rule

# Figure 3 of the paper, whole
WEIGHTS = [[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12], [-0.91, 1.92, 0, -1.03], [1.87, 0, 1.53, 1.49]]
INDICES = [[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]]
CENTROIDS = [-1.00, 0.00, 1.50, 2.00]
GRADIENT = [
    [-0.03, -0.01, 0.03, 0.02],
    [-0.01, 0.01, -0.02, 0.12],
    [-0.01, 0.02, 0.04, 0.01],
    [-0.07, -0.02, 0.01, -0.02],
]
SUMS = [-0.03, 0.04, 0.02, 0.04]
TUNED = [-0.97, -0.04, 1.48, 1.96]


def test_figure_3_clusters() -> None:
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(WEIGHTS))
    job = Compressor(layer, Policy([Rule("*", scheme="kmeans", bits=2)]), teacher=None).prepare()
    group = job.groups[0]
    assert group.indices(group.sites[0]).tolist() == INDICES
    torch.testing.assert_close(group.codebook().detach(), torch.tensor(CENTROIDS), atol=0.01, rtol=0)


def test_figure_3_gradients_and_step() -> None:
    codebook = torch.tensor(CENTROIDS, requires_grad=True)
    lookup(codebook, torch.tensor(INDICES, dtype=torch.int32)).backward(torch.tensor(GRADIENT))
    assert codebook.grad is not None
    torch.testing.assert_close(codebook.grad, torch.tensor(SUMS))
    torch.testing.assert_close(codebook.detach() - 1.0 * codebook.grad, torch.tensor(TUNED))


def test_training_moves_the_centroids_and_never_the_indices() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    job = Compressor(layer, Policy([Rule("*", scheme="kmeans", bits=3)]), teacher=None).prepare()
    group = job.groups[0]
    indices, codebook = group.indices(group.sites[0]).clone(), group.codebook().detach().clone()
    opt = torch.optim.SGD(job.param_groups(lr=0.1), lr=0.1, momentum=0.9, weight_decay=0.1)
    job.attach(opt, 5)
    for _ in range(5):
        opt.zero_grad()
        job.model(torch.randn(4, 16)).square().sum().backward()
        opt.step()
    assert torch.equal(group.indices(group.sites[0]), indices)
    assert not torch.equal(group.codebook().detach(), codebook)
