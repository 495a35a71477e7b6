"""Codecs, one per file, which store the indices of one tensor as bytes."""
