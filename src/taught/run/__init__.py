"""The run folder: files, fingerprints, locks."""
