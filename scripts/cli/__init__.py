"""The command line: options and configs, errors and signals, what is shown."""
