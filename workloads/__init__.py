"""The models, datasets and tasks that config files name, where libraries do not have them."""
