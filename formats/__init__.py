"""The file half: shared tensors to bytes and back. It knows nothing of training.

``SPEC.md`` states the format, ``record`` what a file can say, ``packed`` writes, ``reader`` reads with
numpy alone, ``loader`` makes torch tensors and timm models of it.
Importing this package imports nothing: ``errors`` is cheap to get at.
"""
