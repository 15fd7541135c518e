"""A run: its data, its folder, its training, its answers, its record."""
