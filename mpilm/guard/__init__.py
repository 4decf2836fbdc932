"""How a job ends: with a name, with one message, and with the same code from every rank."""
