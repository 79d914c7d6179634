"""What to run. A config file defines `configure(run)`, which fills in a tree of configs.schema."""
