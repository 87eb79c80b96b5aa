"""Open models of any form, by name, URI or folder."""
