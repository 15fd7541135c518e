"""What makes it fast, equal to the plain form: each file stands for one line of `gpt2.model`."""
