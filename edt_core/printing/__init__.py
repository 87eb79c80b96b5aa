"""What is printed and logged: escaped, and without credentials."""
