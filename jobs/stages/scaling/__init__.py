"""The step that compares the trainings of a ladder under fixed numbers of operations."""
