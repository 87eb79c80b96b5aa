"""The search of `edt tune`: trials of a recipe at a narrow width, and the configuration that muP makes of the best."""
