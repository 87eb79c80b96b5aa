"""The workflow: durable steps, the MLflow catalog and registry, the report, and the command line."""

from edt_core.environment import collect_rarely, quiet_defaults

collect_rarely()
quiet_defaults()
