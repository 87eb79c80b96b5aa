"""Optimizers that no library has in the form that is needed here."""
