"""Text to batches: rows, examples, tokens in memory or in a store, order, plans, batches."""
