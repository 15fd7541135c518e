"""The loop: config, schedule, loss, step, loop."""
