"""The command line: options, errors, signals, output."""
