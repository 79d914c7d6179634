"""What a config names: models and datasets, from libraries first."""
