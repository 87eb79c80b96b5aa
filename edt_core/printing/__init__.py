"""Printed and logged text: escaped, and without credentials."""
