"""Commands that train several models to compare them."""
