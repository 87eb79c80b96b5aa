"""Servers asked whether they answer before their clients wait for them."""
