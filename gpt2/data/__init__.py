"""Text to batches: rows (files), examples (text), tokens (ids), batches (order and padding)."""
