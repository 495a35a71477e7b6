"""The state of a training run on disk, and the fingerprint of what that run depends on."""
