"""The one exception that a wrong configuration raises."""


class ConfigError(ValueError):
    """A configuration that cannot run: one sentence with the field, its value and what would work."""
