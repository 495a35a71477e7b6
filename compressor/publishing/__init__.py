"""Packed files on the hub: the files of a repository, its model card, and how they are pushed."""
