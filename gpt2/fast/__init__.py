"""What makes GPT-2 fast, equal to the plain form."""
