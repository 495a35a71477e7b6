"""Norms and biases of a file whose model was trained with shared weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from compressor import Compressor, Policy, Rule
from compressor.lifecycle.norms import fold_norms
from tests.helpers.norms import images, network


def test_after_training_steps_are_half_as_long() -> None:
    """A quarter of the price is paid, and steps follow from its root; they are powers of two."""
    job = Compressor(network(), Policy([Rule("*", scheme="learnt", rate=1e-7)]), teacher=None)
    job.prepare(calibration=images())
    steps = []
    for trained in (False, True):
        norms = fold_norms(job.model, job.plans, 1e-7, job._measured, trained=trained)
        values = norms.values["4.weight"].double()
        steps.append(next(step for step in 2.0 ** -torch.arange(30.0) if not (values / step).frac().any()))
    assert steps[1] == steps[0] / 2


def test_a_training_makes_the_norms_of_the_file_finer() -> None:
    counts = []
    for epochs in (0, 1):
        job = Compressor(network(), Policy([Rule("*", scheme="learnt", rate=1e-7)]), teacher=None)
        job.prepare(calibration=images())
        if epochs:
            batches: Any = [(images(), torch.zeros(len(images()), dtype=torch.long))]
            job.finetune(DataLoader(batches, batch_size=None), epochs=1, lr=1e-30)
        counts.append(len(job.finish(fold_norms=True).to_bytes()))
    assert counts[1] > counts[0]
