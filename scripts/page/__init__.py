"""The report of a run: its folder read, its charts, its page."""
