"""Jobs of the pipeline, on Ray. A stage is a function of (config, inputs, out, progress).

`inputs` maps roles to committed artifacts, `out` stores the files, and the return value is the manifest's counts.
"""

from edt_core.environment import collect_rarely, quiet_defaults

collect_rarely()
quiet_defaults()
