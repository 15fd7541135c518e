"""The commands of README, and the rooms that they share: cli, runs, tuner, page."""
