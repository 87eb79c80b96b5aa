"""The verbs of the pipeline, one a file, on Ray. Each is a function of (config, inputs, out, progress).

`inputs` maps roles to committed artifacts, `out` takes the files, and what is returned are the counts of the manifest.
"""

from edt_core.environment import quiet_defaults

quiet_defaults()
