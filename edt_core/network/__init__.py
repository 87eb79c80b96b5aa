"""Checks that servers answer, before their clients wait for them."""
