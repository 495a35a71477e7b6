"""The packed file: its container, its metadata, its reader and its writer."""
