"""From a plain model to one that is shared out: layouts of parameters, schedules of actions."""
