"""The tables of the paper of EDT (arXiv 2410.23788): which trainings they compare, and how they are shown."""
