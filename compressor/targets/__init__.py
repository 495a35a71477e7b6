"""The targets of an export, one a file: each a runtime that takes a packed model."""
