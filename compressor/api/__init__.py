"""The functions of TensorFlow Model Optimization, with its names and argument names, built on ``Compressor``.

``clustering``, ``sparsity`` and ``quantization`` wrap a model, which then trains in any loop with any optimiser, and
strip it again. ``docs/from-tfmot.md`` repeats its tutorial and lists the intentional differences.
"""

from __future__ import annotations

from compressor.api.wrapping import job_of

__all__ = ["job_of"]
