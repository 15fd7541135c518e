"""The loop: config, schedule, groups, loss, step, watch, loop."""
