"""Studies: several trainings by one command, and what they show together."""
