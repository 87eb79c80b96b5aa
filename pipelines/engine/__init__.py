"""The workflow engine: steps and how they are run and delivered."""
