"""Files that others may have written: read whole, of bounded size, without running what is in them."""
