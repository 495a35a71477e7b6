"""The packed file: its container, metadata and layout, its reader and its writer."""
