"""The packed file format: shared tensors to bytes and back, independent of training.

``SPEC.md`` specifies the format, ``content`` holds the types of what a file can store and the decoder, ``file.writer``
writes, ``file.reader`` reads with numpy alone, ``loader`` builds torch tensors and timm models.
Importing this package imports none of its modules, so that ``errors`` is cheap to import.
"""
