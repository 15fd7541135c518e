"""A run: data, folder, training, answers, record."""
