"""What a person, a program or a logger gets to see of a training run: each takes its events."""
