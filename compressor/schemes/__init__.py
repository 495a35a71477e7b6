"""The schemes, one a file: each a way to find the codebook and the indices of a group while training."""
