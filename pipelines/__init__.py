"""Ray Data pipelines: datasets in, datasets out."""
