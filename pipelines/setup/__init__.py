"""What happens before a run: init, doctor, dry run, hardware."""
