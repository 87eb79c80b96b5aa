"""Models of any form, opened by name, URI or folder."""
