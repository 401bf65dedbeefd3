"""TODO"""

from blrlab.experiments import defaults


def get_config(scale: str = "small"):
    """Return the config of one scale, small or full."""
    config = defaults.dit(scale)
    config.factors.format = "monarch"
    return config
