"""The workflow: durable steps, the MLflow catalog and registry, the report, and the command line."""

from edt_core.environment import quiet_defaults

quiet_defaults()
