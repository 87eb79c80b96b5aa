"""What a person sees during a run, and its log."""
