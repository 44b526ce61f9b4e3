"""The workers: load, decompose, install, score, export. Nothing here imports `search`."""
