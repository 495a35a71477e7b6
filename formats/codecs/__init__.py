"""Codecs, one a file: how the indices of one tensor become bytes."""
