"""Makes pytest collect the statements of this folder: ``pytest properties --target T``."""

pytest_plugins = ["rescnn_verify.plugin"]
