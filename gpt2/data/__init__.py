"""Text to batches: examples (text), tokens (ids), batches (order and padding)."""
