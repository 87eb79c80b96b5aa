"""The commands of `edt`, a file a concern. Heavy libraries are imported inside the functions: help answers at once."""
