"""What makes it fast, equal to the plain form: compiling, CUDA graphs, products, dropout masks."""
