"""What the rest stands on: files that are written whole."""
