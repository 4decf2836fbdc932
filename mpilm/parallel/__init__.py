"""From a plain model to a parallel one: the plan and layout tables, and what is applied to the model from outside."""
