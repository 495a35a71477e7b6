"""The verbs of TensorFlow Model Optimization, with their names and argument names, over the same engine.

``clustering``, ``sparsity`` and ``quantization`` wrap a model, which then trains in any loop with any optimiser, and
strip it again. ``docs/from-tfmot.md`` has its tutorial, and what differs on purpose.
"""

from __future__ import annotations

from compressor.api.wrapping import job_of

__all__ = ["job_of"]
