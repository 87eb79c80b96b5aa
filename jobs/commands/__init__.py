"""What people type beside the stages: evaluate, sweep, draw, search, export, verify."""
