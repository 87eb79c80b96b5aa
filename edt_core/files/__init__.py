"""Reading of untrusted files: bounded size, no code execution."""
