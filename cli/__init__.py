"""The command ``compress``: it parses, calls and prints, and computes nothing itself."""
